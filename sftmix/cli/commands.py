"""The commands by name. Each imports its modules when it runs, so that `--help` and wrong options need no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftmix.pipeline.identity import StageName


@dataclass(frozen=True)
class Command:
    """A command: its line in the overview, and the function that takes the words after its name."""

    summary: str
    main: Callable[[Sequence[str]], None]


# -------------------------------------------------------------------- commands with a configuration

_EXAMPLE = "--model.path NAME --data.train rows.json --out runs/first"
_ABOUT: dict[str, tuple[StageName, str]] = {
    "run": (
        "train",
        f"""Do the whole recipe: reference training, confidence, split, SFTMix training, export.
Stages that are done are read back, so the same command continues an interrupted run.

  sftmix run {_EXAMPLE} --data.eval_fraction 0.05
  sftmix run --config runs/first/config.yaml --out runs/second --objective.mu 0.4
  torchrun --nproc_per_node 8 -m sftmix run --config recipe:NAME --out runs/third""",
    ),
    "reference": (
        "reference",
        f"""Train the reference model and score every example at its checkpoints (confidence/dynamics.parquet).

  sftmix reference {_EXAMPLE} --reference.checkpoints 5""",
    ),
    "confidence": (
        "confidence",
        f"""Turn the training dynamics into one confidence per example (confidence/confidence.parquet).

  sftmix confidence {_EXAMPLE} --confidence LogPerplexity
  sftmix confidence {_EXAMPLE} --push_to_hub OWNER/NAME    share the scores, without the rows""",
    ),
    "split": (
        "split",
        f"""Divide the examples into a confident and an unconfident half (split/split.parquet).

  sftmix split {_EXAMPLE} --splitter Median""",
    ),
    "train": (
        "train",
        f"""Train the target model and export it to train/model; earlier stages run first where they are missing.

  sftmix train {_EXAMPLE} --training.epochs 3""",
    ),
}


def _stage(name: str, argv: Sequence[str]) -> None:
    """Run one of the commands run, reference, confidence, split, train."""
    from sftmix.cli.parsing import configuration
    from sftmix.cli.results import results, say
    from sftmix.config.checks import validate

    sharing = import_module("sftmix.tools.sharing.command")
    own = sharing.SCORES if name == "confidence" else ()
    config, parsed = configuration(name, _ABOUT[name][1], argv, own)
    validate(config)
    until = _ABOUT[name][0]
    say(f"{name}: {config.model.path} on {', '.join(config.data.train)}, in {config.out}")
    from sftmix.pipeline.start import check_start

    check_start(config, until)
    from sftmix.pipeline.recipe import run_valid

    summary = run_valid(config, until=until)
    say("\n".join(results(str(config.out), summary, until)), sys.stdout)
    sharing.after_stage(config, until, parsed)


def _tool(room: str) -> Callable[[Sequence[str]], None]:
    """Return the function of a command of sftmix.tools, whose module is imported when it is called."""

    def main(argv: Sequence[str]) -> None:
        import_module(f"sftmix.tools.{room}").main(argv)

    return main


COMMANDS = {
    "quickstart": Command(
        "see the whole recipe in under three minutes, without any download", _tool("quickstart.command")
    ),
    "run": Command("do all that is needed: reference, confidence, split, training, export", partial(_stage, "run")),
    "reference": Command("only up to the training dynamics of the reference", partial(_stage, "reference")),
    "confidence": Command("only up to the confidence of every example", partial(_stage, "confidence")),
    "split": Command("only up to the split", partial(_stage, "split")),
    "train": Command("train the target, with the stages it needs", partial(_stage, "train")),
    "compare": Command(
        "run a table: variants x seeds, with the statistics of their differences", _tool("compare.command")
    ),
    "estimate": Command("say what a run will need: memory and hours, before it is started", _tool("estimate.command")),
    "preview": Command("show rows as the model will see them", _tool("preview.command")),
    "export": Command("write a checkpoint as a Hugging Face model", _tool("sharing.command")),
    "chat": Command("talk to a finished model, or to two side by side", _tool("answers.chat")),
    "generate": Command("let finished models answer a file of prompts", _tool("answers.generate")),
    "report": Command("write a page that shows what a run saw in the data, and what came out", _tool("report.command")),
    "suspects": Command("list the rows that are most likely wrong, to be read first", _tool("suspects.command")),
    "evaluate": Command("measure the models of a run on benchmarks, in one table", _tool("evaluate.command")),
    "verify": Command("check a result: make some steps of a run again and compare them", _tool("verify.command")),
    "status": Command("show how far runs are", _tool("status.command")),
    "track": Command("send the metrics of a run to TensorBoard, W&B, trackio or SwanLab", _tool("trackers.command")),
    "components": Command("list what can be swapped", _tool("listing.command")),
}
