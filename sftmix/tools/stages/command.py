"""The commands that make a run: all of it, or its stages up to one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftmix.cli.parsing import configuration
from sftmix.cli.say import say, say_wrapped
from sftmix.disk.files import naming_damage
from sftmix.tools.runs.results import names_own_classes, results
from sftmix.tools.sharing.command import write_run_cards

_EXAMPLE = "--model.path NAME --data.train rows.json --out runs/first"
_ABOUT = {
    "run": f"""Do the whole recipe: reference training, confidence, split, SFTMix training, export.
Stages that are done are read back, so the same command continues an interrupted run.

  sftmix run {_EXAMPLE} --data.eval_fraction 0.1 --training.learning_rate 1e-4
  sftmix run --config runs/first/config.yaml --out runs/second --objective.mu 0.4
  torchrun --nproc_per_node 8 -m sftmix run --config recipe:NAME --out runs/third""",
    "reference": f"""Train the reference model and score every example at its checkpoints (confidence/dynamics.parquet).

  sftmix reference {_EXAMPLE} --reference.checkpoints 5""",
    "confidence": f"""Turn the training dynamics into one confidence per example (confidence/confidence.parquet).

  sftmix confidence {_EXAMPLE} --confidence LogPerplexity""",
    "split": f"""Divide the examples into a confident and an unconfident half (split/split.parquet).

  sftmix split {_EXAMPLE} --splitter Median""",
    "train": f"""Train the target model and export it to train/model; earlier stages run first where they are missing.

  sftmix train {_EXAMPLE} --training.epochs 3""",
}


def main(name: str, argv: Sequence[str]) -> None:
    """Make the stages of a command; `argv` are the words after its name."""
    config, _ = configuration(name, _ABOUT[name], argv)
    until: Any = "train" if name == "run" else name
    say(f"{name}: {config.model.path} on {', '.join(config.data.train)}, in {config.out}")
    from sftmix.tools.runs.start import check_start, doubts

    for doubt in doubts(config):
        say(doubt)
    check_start(config, until)  # before torch is imported, which takes seconds
    from sftmix.pipeline import recipe

    summary = recipe.run(config, until=until, say_rows=say_wrapped)
    with naming_damage(f"a figures.json of {config.out}"):
        lines = results(str(config.out), summary, until, own=names_own_classes(config.as_dict()))
        say_wrapped("\n".join(lines))
    if until == "train":
        write_run_cards(Path(config.out or ""))
