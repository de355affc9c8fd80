"""The commands. Each imports its modules when it runs, so that `--help` and wrong options need no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sftmix.common.errors import ConfigError
from sftmix.common.names import path_problem

if TYPE_CHECKING:
    from sftmix.pipeline.stages import StageName


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
_PREVIEW = """Show rows as the model will see them: text, token ids, labels, the mask in colour, and dropped rows.
Nothing is trained or written; no --out is needed.

  sftmix preview --model.path NAME --data.train rows.json --rows 5"""


def _stage(name: str, argv: Sequence[str]) -> None:
    """Run one of the commands run, reference, confidence, split, train."""
    from sftmix.cli.parsing import configuration
    from sftmix.cli.results import results, say, starting
    from sftmix.cli.sharing import SCORES, after_stage, check_push
    from sftmix.config.checks import validate

    own = SCORES if name == "confidence" else ()
    config, parsed = configuration(name, _ABOUT[name][1], argv, own, prints=True)
    validate(config)
    _refuse_table(config.out or "")
    if own:
        check_push(parsed.push_to_hub, parsed.license, private=parsed.private)
    until = _ABOUT[name][0]
    if until in ("split", "train"):  # the others make what they are asked for
        for note in config.unused(divides=until == "split"):
            say(f"note: {note}")
    say(starting(name, config))
    from sftmix.pipeline.start import check_start

    check_start(config, until)
    from sftmix.pipeline.recipe import run

    summary = run(config, until=until)
    say("\n".join(results(str(config.out), summary, until)), sys.stdout)
    after_stage(config, until, parsed)


def _refuse_table(out: str) -> None:
    """Raise ConfigError for the directory of a table: the files of a run would lie among its cells."""
    from sftmix.compare.plan import CONFIGURATION

    if os.path.exists(os.path.join(out, CONFIGURATION)):
        raise ConfigError(f"out: {out} holds a table of `compare` ({CONFIGURATION}); choose another --out")


def _preview(argv: Sequence[str]) -> None:
    from sftmix.cli.arguments import OwnOption
    from sftmix.cli.parsing import configuration
    from sftmix.config.checks import validate

    own = (
        OwnOption("rows", int, 3, "N", "How many rows to show."),
        OwnOption("no_color", bool, False, "", "Plain text; also without a terminal, or with NO_COLOR set."),
    )
    config, parsed = configuration("preview", _PREVIEW, argv, own)
    if parsed.rows < 1:
        raise ConfigError(f"rows is {parsed.rows}; allowed: at least 1")
    validate(config, needs_out=False)
    from sftmix.pipeline.start import check_names_given

    check_names_given(config)
    from sftmix.pipeline.rows import preview

    color = sys.stdout.isatty() and not parsed.no_color and not os.environ.get("NO_COLOR")
    print(preview(config, parsed.rows, color=color))


def _compare(argv: Sequence[str]) -> None:
    from sftmix.cli.compare import main

    main(argv)


def _estimate(argv: Sequence[str]) -> None:
    from sftmix.cli.estimate import main

    main(argv)


# ------------------------------------------------------------------ commands with options of their own


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def __init__(self, name: str, description: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"sftmix {name}", description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


_READ = ("run", "runs", "place", "beside", "models", "prompts", "read_blind", "key", "data_dir", "shots", "test")
"""Options that name what is read: files, directories, or ids of the hub; several with commas between them."""


def _parsed(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command; raise ConfigError for names that cannot be read, and places not to be written."""
    given = parser.parse_args(argv)
    for option in _READ:
        names = getattr(given, option, None) or ()
        for name in names.split(",") if isinstance(names, str) else names:
            _refuse_unreadable(name)
    for option in ("to", "out"):
        place = getattr(given, option, None)
        if place and (problem := path_problem(place) or _unwritable(Path(place))):
            raise ConfigError(f"--{option}: {place!r} {problem}")
    return given


def _refuse_unreadable(name: str) -> None:
    """Raise ConfigError for a name that no file can have; nothing may have it, since a hub may know it."""
    try:
        os.stat(name.strip())
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # a NUL in it is a ValueError
        raise ConfigError(f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _unwritable(place: Path) -> str | None:
    """Return why nothing can be written at a place, or None."""
    there = next((path for path in (place, *place.parents) if os.path.exists(path)), Path())
    if there != place and not there.is_dir():
        return f"cannot be written: {there} is a file; name a place in a directory"
    if not os.access(there, os.W_OK):
        return f"cannot be written: {there} is not yours to write; name another place"
    return None


def _quickstart(argv: Sequence[str]) -> None:
    about = """See the whole recipe work in under three minutes on two CPU cores, without any download.

It generates a small synthetic instruction set whose truth about confidence is known, makes a tokenizer and a small
Llama on the spot, and trains SFTMix beside plain NTP at the same seed. Each stage says what happened; the table at the
end shows whatever came out.

  sftmix quickstart"""
    parser = _Parser("quickstart", about)
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="where to write [%(default)s]")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of everything [%(default)s]")
    given = _parsed(parser, argv)
    from sftmix.cli.results import say

    say(f"quickstart: a small model on rows of known truth, in {given.out}")
    _claim(Path(given.out), given.seed)
    from sftmix.quickstart.run import quickstart

    quickstart(given.out, given.seed)


def _claim(out: Path, seed: int) -> None:
    """Mark a directory as a quickstart's with this seed; raise ConfigError if it holds anything else."""
    marker = out / ".quickstart"
    if marker.exists():
        theirs = marker.read_text(encoding="utf-8").strip()
        if theirs != str(seed):
            raise ConfigError(f"{out} holds the quickstart of seed {theirs}, not {seed}; choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something that the quickstart did not write; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{seed}\n", encoding="utf-8")


def _export(argv: Sequence[str]) -> None:
    about = """Write a checkpoint of a run as a Hugging Face model directory: weights, tokenizer, template, stop ids.

  sftmix export runs/first --to my-model
  sftmix export runs/first --to my-model-at-200 --step 200 --dtype bfloat16
  sftmix export runs/lora --to my-model --merge
  sftmix export runs/first --push_to_hub OWNER/NAME --license llama3.1

Of a run with adapters it writes the adapters, as PEFT does, or with --merge the whole model. A model card, README.md,
stands beside the weights. --push_to_hub without --to uploads train/model, or the checkpoint that is named."""
    parser = _Parser("export", about)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", metavar="DIR", help="directory to write; it must not exist yet")
    parser.add_argument("--step", type=int, metavar="N", help="optimizer step of the checkpoint [the newest]")
    best = "the weights of the best held-out evaluation, of a run with --checkpoint.keep_best true"
    parser.add_argument("--best", action="store_true", help=best)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    what = "dtype of the weights; auto: as the base model was stored, adapters float32 [%(default)s]"
    parser.add_argument("--dtype", choices=dtypes, default="auto", help=what)
    parser.add_argument("--merge", action="store_true", help="put the adapters of a LoRA run into the model's weights")
    from sftmix.cli.sharing import add_push_options, export

    add_push_options(parser)
    export(_parsed(parser, argv))


def _leaf(name: str, argv: Sequence[str]) -> None:
    """Run a command of a leaf room, whose help, options and function stand in a module of its name."""
    module = import_module(f"sftmix.cli.{name}")
    parser = _Parser(name, module.ABOUT)
    module.add_options(parser)
    module.main(_parsed(parser, argv))


def _status(argv: Sequence[str]) -> None:
    about = """Show how far runs are: stages, steps, last loss, time left, and whether the process is alive.
It reads files only, so it works while a run goes on and after it has ended.

  sftmix status runs/first"""
    parser = _Parser("status", about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    given = parser.parse_args(argv)
    from sftmix.cli.results import say
    from sftmix.cli.status import reports

    told, problems = reports(given.runs)
    if told:
        say("\n\n".join(told), sys.stdout)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def _track(argv: Sequence[str]) -> None:
    about = """Send the metrics of a run to a tracker: every step that the tracker lacks, each once, then the summary.
It reads files only, so it works while a run goes on, after it has ended, and where a live tracker had no network.

  sftmix track runs/first --to tensorboard
  sftmix track runs/first --to wandb --project my-project"""
    from sftmix.trackers import TRACKERS, tracker_class

    parser = _Parser("track", about)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", required=True, choices=TRACKERS, help="the tracker; its package must be installed")
    parser.add_argument("--project", metavar="NAME", help="project of the tracker [sftmix]; tensorboard has none")
    given = parser.parse_args(argv)
    _refuse_unreadable(given.run)
    tracker = tracker_class(given.to)
    if given.project is not None and given.to == "tensorboard":
        raise ConfigError(f"--project is {given.project}, but tensorboard has no projects; leave it out")
    from sftmix.trackers.replay import replay

    options = {} if given.project is None else {"project": given.project}
    print(replay(Path(given.run), tracker(**options)))


def _components(argv: Sequence[str]) -> None:
    about = """List the components that can be swapped, one line each by the option that chooses them.
With a name, show one with its options.

  sftmix components
  sftmix components SFTMix"""
    parser = _Parser("components", about)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a component")
    given = parser.parse_args(argv)
    from sftmix.cli.listing import details, overview

    print(details(given.name) if given.name else overview(), end="")


COMMANDS = {
    "quickstart": Command("see the whole recipe in under three minutes, without any download", _quickstart),
    "run": Command("do all that is needed: reference, confidence, split, training, export", partial(_stage, "run")),
    "reference": Command("only up to the training dynamics of the reference", partial(_stage, "reference")),
    "confidence": Command("only up to the confidence of every example", partial(_stage, "confidence")),
    "split": Command("only up to the split", partial(_stage, "split")),
    "train": Command("train the target, with the stages it needs", partial(_stage, "train")),
    "compare": Command("run a table: variants x seeds, with the statistics of their differences", _compare),
    "estimate": Command("say what a run will need: memory and hours, before it is started", _estimate),
    "preview": Command("show rows as the model will see them", _preview),
    "export": Command("write a checkpoint as a Hugging Face model", _export),
    "chat": Command("talk to a finished model, or to two side by side", partial(_leaf, "chat")),
    "generate": Command("let finished models answer a file of prompts", partial(_leaf, "generate")),
    "report": Command(
        "write a page that shows what a run saw in the data, and what came out", partial(_leaf, "report")
    ),
    "evaluate": Command("measure the models of a run on benchmarks, in one table", partial(_leaf, "evaluate")),
    "verify": Command("check a result: make some steps of a run again and compare them", partial(_leaf, "verify")),
    "status": Command("show how far runs are", _status),
    "track": Command("send the metrics of a run to TensorBoard, W&B, trackio or SwanLab", _track),
    "components": Command("list what can be swapped", _components),
}
