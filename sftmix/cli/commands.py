"""The commands by name. Each imports its modules when it runs, so that `--help` and wrong options need no torch."""

from collections.abc import Sequence
from contextvars import copy_context
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A command: its line in the overview, and its module, whose function `main` it is."""

    summary: str
    module: str


COMMANDS = {
    "quickstart": Command(
        "see the whole recipe in under three minutes, without any download", "sftmix.tools.quickstart.command"
    ),
    "run": Command("do all of it: reference, confidence, split, training, export", "sftmix.tools.stages.command"),
    "reference": Command("only up to the training dynamics of the reference", "sftmix.tools.stages.command"),
    "confidence": Command("only up to the confidence of every example", "sftmix.tools.stages.command"),
    "split": Command("only up to the split", "sftmix.tools.stages.command"),
    "train": Command("the same as run, by the name of its last stage", "sftmix.tools.stages.command"),
    "compare": Command(
        "run a table: variants x seeds, with the statistics of their differences", "sftmix.tools.compare.command"
    ),
    "estimate": Command(
        "say what a run will need: memory and hours, before it is started", "sftmix.tools.estimate.command"
    ),
    "preview": Command("show rows as the model will see them", "sftmix.tools.preview.command"),
    "export": Command("write a checkpoint as a Hugging Face model", "sftmix.tools.sharing.command"),
    "chat": Command("talk to a finished model, or to two side by side", "sftmix.tools.answers.chat"),
    "generate": Command("let finished models answer a file of prompts", "sftmix.tools.answers.generate"),
    "report": Command(
        "write a page that shows what a run saw in the data, and what came out", "sftmix.tools.report.command"
    ),
    "suspects": Command("list the rows that are most likely wrong, to be read first", "sftmix.tools.suspects.command"),
    "evaluate": Command("measure the models of a run on benchmarks, in one table", "sftmix.tools.evaluate.command"),
    "verify": Command("check a result: make some steps of a run again and compare them", "sftmix.tools.verify.command"),
    "status": Command("show how far runs are", "sftmix.tools.status.command"),
    "track": Command(
        "send the metrics of a run to MLflow, TensorBoard, W&B, trackio or SwanLab", "sftmix.tools.trackers.command"
    ),
    "components": Command("list what can be swapped", "sftmix.tools.listing.command"),
}
"""The import paths are whole, so that tests/test_architecture.py reads what the command line imports."""


def call(name: str, argv: Sequence[str]) -> None:
    """Run a command with the words after its name. Those for its class `Options`, if it has one, are read here."""
    command = import_module(COMMANDS[name].module)
    if not hasattr(command, "Options"):  # the words are options of a run
        return copy_context().run(command.main, name, argv)  # what names mean there ends with it

    args = import_module("sftmix.tools.runs.arguments").read_words(name, command, argv)
    with import_module("sftmix.tools.runs.read").reading(args):
        command.main(args)
