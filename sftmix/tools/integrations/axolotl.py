"""The plugin of axolotl, `plugins: [sftmix.tools.integrations.axolotl.SFTMixPlugin]`, and its command `sftmix`."""

import sys
from dataclasses import fields

import click
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from sftmix.cli import main
from sftmix.tools.integrations import DynamicsCallback, SFTMixArguments, SFTMixTrainer


class SFTMixInput(BaseModel):
    """Keys of the YAML: the fields of SFTMixArguments (no split: plain training), and a dynamics file to be written."""

    sftmix_split: str = ""
    sftmix_mu: float = 0.2
    sftmix_alpha: float = 0.5
    sftmix_mixup_mean: str = "own"
    sftmix_dynamics: str = ""


class SFTMixPlugin(BasePlugin):
    """Train with SFTMix if `sftmix_split` is set; write training dynamics if `sftmix_dynamics` is."""

    def get_input_args(self):
        return f"{__name__}.SFTMixInput"

    def get_training_args_mixin(self):
        return f"{SFTMixArguments.__module__}.SFTMixArguments"

    def get_training_args(self, cfg):
        return {field.name: cfg[field.name] for field in fields(SFTMixArguments)}

    def get_trainer_cls(self, cfg):
        from axolotl.core.trainers.base import AxolotlTrainer

        return type("SFTMixAxolotlTrainer", (SFTMixTrainer, AxolotlTrainer), {}) if cfg.sftmix_split else None

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [DynamicsCallback(trainer.train_dataset, cfg.sftmix_dynamics)] if cfg.sftmix_dynamics else []


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Confidence, split and report of SFTMix: `axolotl sftmix WORDS` is `sftmix WORDS`."""
    sys.exit(main(list(words)))
