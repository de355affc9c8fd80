"""The plugin of axolotl, `plugins: [sftmix.tools.integrations.axolotl.SFTMixPlugin]`."""

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from sftmix.tools.integrations import DynamicsCallback, SFTMixArguments, SFTMixTrainer


class SFTMixInput(BaseModel):
    """Keys of the YAML: the fields of SFTMixArguments, and a dynamics file to be written; none of them: plain training.

    None is a key that is not given: workers of Ray read the keys again, from what is not None here.
    """

    sftmix_split: str | None = None
    sftmix_mu: float | None = None
    sftmix_alpha: float | None = None
    sftmix_mixup_mean: str | None = None
    sftmix_dynamics: str | None = None


class SFTMixPlugin(BasePlugin):
    """Train with SFTMix if `sftmix_split` is set; write training dynamics if `sftmix_dynamics` is.

    Raises ValueError for other keys without one of them, before anything is loaded.
    """

    def register(self, cfg):
        given = [key for key in cfg if key.startswith("sftmix_")]  # also sftmix_spilt, which pydantic would drop
        if given and not (cfg.sftmix_split or cfg.sftmix_dynamics):
            raise ValueError(
                f"{given} without sftmix_split or sftmix_dynamics would be plain training: name a split.parquet or "
                "dynamics.parquet in sftmix_split, or a file to be written in sftmix_dynamics, or take them out"
            )

    def get_input_args(self):
        return f"{__name__}.SFTMixInput"

    def get_training_args_mixin(self):
        return f"{SFTMixArguments.__module__}.SFTMixArguments"

    def get_training_args(self, cfg):
        return {key: cfg[key] for key in SFTMixArguments.__dataclass_fields__ if key in cfg}

    def get_trainer_cls(self, cfg):
        from axolotl.core.trainers.base import AxolotlTrainer

        # SFTMixTrainer is first: its methods override those of axolotl, which are Trainer's.
        return type("SFTMixAxolotlTrainer", (SFTMixTrainer, AxolotlTrainer), {}) if cfg.sftmix_split else None

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [DynamicsCallback(trainer.train_dataset, cfg.sftmix_dynamics)] if cfg.sftmix_dynamics else []
