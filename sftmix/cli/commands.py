"""The commands by name. Each imports its modules when it runs, so that `--help` and wrong options need no torch."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sftmix.common.errors import ConfigError
from sftmix.common.files import path_problem

# -------------------------------------------------------------------- commands with a configuration

_EXAMPLE = "--model.path NAME --data.train rows.json --out runs/first"
_ABOUT = {
    "run": f"""Do the whole recipe: reference training, confidence, split, SFTMix training, export.
Stages that are done are read back, so the same command continues an interrupted run.

  sftmix run {_EXAMPLE} --data.eval_fraction 0.05
  sftmix run --config runs/first/config.yaml --out runs/second --objective.mu 0.4
  torchrun --nproc_per_node 8 -m sftmix run --config recipe:NAME --out runs/third""",
    "reference": f"""Train the reference model and score every example at its checkpoints (confidence/dynamics.parquet).

  sftmix reference {_EXAMPLE} --reference.checkpoints 5""",
    "confidence": f"""Turn the training dynamics into one confidence per example (confidence/confidence.parquet).

  sftmix confidence {_EXAMPLE} --confidence LogPerplexity
  sftmix confidence {_EXAMPLE} --push_to_hub OWNER/NAME    share the scores, without the rows""",
    "split": f"""Divide the examples into a confident and an unconfident half (split/split.parquet).

  sftmix split {_EXAMPLE} --splitter Median""",
    "train": f"""Train the target model and export it to train/model; earlier stages run first where they are missing.

  sftmix train {_EXAMPLE} --training.epochs 3""",
}


def _stage(name: str, argv: Sequence[str]) -> None:
    """Run one of the commands run, reference, confidence, split, train."""
    from sftmix.cli.parsing import configuration
    from sftmix.cli.results import results, say

    sharing = import_module("sftmix.tools.sharing.command")
    options = sharing.SCORES if name == "confidence" else ()
    config, values = configuration(name, _ABOUT[name], argv, options)
    until: Any = "train" if name == "run" else name
    say(f"{name}: {config.model.path} on {', '.join(config.data.train)}, in {config.out}")
    from sftmix.pipeline.start import check_start

    check_start(config, until)
    from sftmix.pipeline.recipe import run

    summary = run(config, until=until, validated=True)
    say("\n".join(results(str(config.out), summary, until)), sys.stdout)
    sharing.after_stage(config, until, values)


class Command(NamedTuple):
    """A command: its line in the overview, and its module in `sftmix.tools`; "" for a stage of a run."""

    summary: str
    module: str = ""


COMMANDS = {
    "quickstart": Command("see the whole recipe in under three minutes, without any download", "quickstart.command"),
    "run": Command("do all that is needed: reference, confidence, split, training, export"),
    "reference": Command("only up to the training dynamics of the reference"),
    "confidence": Command("only up to the confidence of every example"),
    "split": Command("only up to the split"),
    "train": Command("train the target, with the stages it needs"),
    "compare": Command("run a table: variants x seeds, with the statistics of their differences", "compare.command"),
    "estimate": Command("say what a run will need: memory and hours, before it is started", "estimate.command"),
    "preview": Command("show rows as the model will see them", "preview.command"),
    "export": Command("write a checkpoint as a Hugging Face model", "sharing.command"),
    "chat": Command("talk to a finished model, or to two side by side", "answers.chat"),
    "generate": Command("let finished models answer a file of prompts", "answers.generate"),
    "report": Command("write a page that shows what a run saw in the data, and what came out", "report.command"),
    "suspects": Command("list the rows that are most likely wrong, to be read first", "suspects.command"),
    "evaluate": Command("measure the models of a run on benchmarks, in one table", "evaluate.command"),
    "verify": Command("check a result: make some steps of a run again and compare them", "verify.command"),
    "status": Command("show how far runs are", "status.command"),
    "track": Command("send the metrics of a run to TensorBoard, W&B, trackio or SwanLab", "trackers"),
    "components": Command("list what can be swapped", "listing.command"),
}


def call(name: str, argv: Sequence[str]) -> None:
    """Run a command with the words after its name; one without a configuration gets them parsed.

    Raises ConfigError for places that cannot be written.
    """
    if not COMMANDS[name].module:
        return _stage(name, argv)
    command = import_module(f"sftmix.tools.{COMMANDS[name].module}")
    if not hasattr(command, "add_options"):  # it reads options of a run
        return command.main(argv)
    form = argparse.RawDescriptionHelpFormatter
    parser = WordsParser(f"sftmix {name}", description=command.ABOUT, formatter_class=form, allow_abbrev=False)
    command.add_options(parser)
    args = parser.parse_args(argv)
    for option in ("to", "out"):
        if place := getattr(args, option, None):
            path, problem = Path(place), path_problem(place)
            existing = next(part for part in (path, *path.parents) if os.path.exists(part))
            if not (problem or ((existing == path or existing.is_dir()) and os.access(existing, os.W_OK))):
                problem = (
                    f"cannot be written: {existing} is a file, or not yours to write; name a place in a directory of "
                    "yours"
                )
            if problem:
                raise ConfigError(f"--{option}: {place!r} {problem}")
    command.main(args)


class WordsParser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")
