"""`export`, and the model cards that other commands leave behind."""

import os
import re
import shutil
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from sftmix.cli.say import say
from sftmix.disk.files import read_steps, remove_leftovers
from sftmix.disk.places import is_there
from sftmix.tools.runs.models import Dtype
from sftmix.tools.runs.read import Reading, check_finished, refuse_no_run
from sftmix.words.errors import ConfigError

ABOUT = """Write a checkpoint of a run as a Hugging Face model directory: weights, tokenizer, template, stop ids.

  sftmix export runs/first --to my-model
  sftmix export runs/first --to my-model-at-200 --step 200 --dtype bfloat16
  sftmix export runs/lora --to my-model --merge

For a run with adapters it writes the adapters, as PEFT does, or with --merge the whole model. A model card, README.md,
is written beside the weights. `hf upload OWNER/NAME my-model` puts it on the hub."""


@dataclass
class Options(Reading):
    run: str
    """RUN: run directory"""
    _: KW_ONLY
    to: str
    """DIR: directory to write; it must not exist yet"""
    step: int | None = None
    """N: optimizer step of the checkpoint [the newest]"""
    best: bool = False
    """the weights of the best held-out evaluation, of a run with --checkpoint.keep_best true"""
    dtype: Dtype = "auto"
    """dtype of the weights; auto: as the base model was stored, adapters float32 [%(default)s]"""
    merge: bool = False
    """put the adapters of a LoRA run into the model's weights"""
    license: str | None = None
    """NAME: licence of the model, for its card; it follows from the licences of the base model and the data"""


def main(args: Options) -> None:
    """Write the model with its card, and print the place."""
    import psutil

    from sftmix.pipeline.validity import is_finished
    from sftmix.tools.runs.export import export_run

    run, final = Path(args.run), Path(args.to)
    refuse_no_run(run)
    check_finished(run)
    if is_there(final):
        raise ConfigError(f"{final} exists; name a directory that does not")
    for old in final.parent.glob(".tmp-*"):
        # Of an export that was killed: .tmp-mm.4711, and .tmp-.tmp-mm.4711.4711 with its weights; none of mm.bf16.
        mine = re.fullmatch(rf"(?:\.tmp-)+{re.escape(final.name)}(?:\.(\d{{1,9}}))+", old.name)
        if mine and not psutil.pid_exists(int(mine[1])):
            shutil.rmtree(old, ignore_errors=True)
    to = final.with_name(f".tmp-{final.name}.{os.getpid()}")  # beside it, so that the last step is a rename
    step = export_run(run, to, checkpoint=args.step, best=args.best, dtype=args.dtype, merge=args.merge)
    # The checkpoint of the last step has the weights that the run measured.
    if is_finished(run / "train") and step == read_steps(run / "train")[-1]["step"]:
        step = None
    measured = step is None and not args.merge and args.dtype == "auto"  # merged or rounded, they are other numbers
    if not measured:
        say("these are not the weights of train/model, as the run measured them: it has no figures of these")
    from sftmix.tools.sharing.cards import CARD, model_card, write_card  # import torch, which no refusal waits for

    card = model_card(run, "train", license=args.license, step=step, merged=args.merge, measured=measured)
    write_card(to / CARD, card)
    to.rename(final)  # with its card
    print(final)


def write_run_cards(*runs: Path) -> None:
    """Write the cards of train/model and baseline/model as the files of each run are now; rank 0 alone does.

    A stage without a model gets none, and a card that was edited stays.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from sftmix.pipeline.stages import TRAINED
    from sftmix.tools.sharing.cards import CARD, model_card, write_card

    for run in runs:
        for stage in TRAINED:
            file = run / stage / "model" / CARD
            remove_leftovers(file.parent, CARD)  # of a stage that is done nobody else would
            if file.parent.is_dir():
                write_card(file, model_card(run, stage))
