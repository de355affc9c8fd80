"""`chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper

from sftmix.cli.results import say
from sftmix.cli.words import read_words
from sftmix.tools.answers.generate_command import add_sampling, sampling

ABOUT = """Talk to a finished model in the terminal, by the chat template and the stop ids of its training.

  sftmix chat runs/first
  sftmix chat runs/first --beside baseline       both models answer each question
  echo "Name three colours." | sftmix chat my-model --temperature 0.7

Lines that begin with / are commands: /help lists them. Ctrl-C stops an answer, and with two models takes the turn
back in both. Ctrl-D ends."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN_OR_MODEL", help="run directory, model directory or hub id")
    beside = "a second model: baseline or base of the run, another run or a model"
    parser.add_argument("--beside", metavar="NAME", help=beside)
    add_sampling(parser)


def main(argv: Sequence[str]) -> None:
    """Load the models and talk until the user ends it."""
    given = read_words("chat", ABOUT, add_options, argv)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8: no tokenizer takes what stands for them
    from sftmix.common.errors import refuse
    from sftmix.pipeline.finished import TARGET, finished_models

    options = sampling(given)
    refuse([*options.problems(), *options.unused([0.0])], "the options of chat")
    found = finished_models(given.place, [TARGET, *([given.beside] if given.beside else [])], option="--beside")
    say(f"chat: {', '.join(model.name for model in found)}; /help lists the commands, Ctrl-D ends")
    import torch

    from sftmix.pipeline.loaded import load_finished
    from sftmix.tools.answers.chat import chat

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chat([load_finished(model, dtype=dtype, device=device) for model in found], options, _lines(), sys.stdout)


def _lines() -> Iterator[str]:
    """Yield what the user writes; from a pipe without a prompt sign. Ctrl-C while writing drops the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # arrow keys and a history for input()

    while (line := _typed()) is not None:
        yield line


def _typed() -> str | None:
    """Read one line from the terminal; None at Ctrl-D, nothing after Ctrl-C."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\n(Ctrl-D or /quit ends)")
        return ""
