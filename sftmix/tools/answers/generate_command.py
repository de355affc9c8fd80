"""`generate`: models answer a file of prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from sftmix.cli.results import say
from sftmix.cli.words import read_words, refuse_others
from sftmix.common.errors import ConfigError
from sftmix.tools.answers.options import FORMATS, AnswerOptions

ABOUT = """Let finished models answer a file of prompts; the same command continues where it was interrupted.

  sftmix generate runs/first --to answers.jsonl                     the held-out rows of the run
  sftmix generate runs/first --prompts rows.jsonl --to answers.jsonl --models target,baseline,base
  sftmix generate my-model --prompts alpaca_eval.json --format alpaca_eval --to outputs
  sftmix generate runs/first --prompts question.jsonl --format mt_bench --to data/mt_bench
  sftmix generate runs/first --models target,baseline --format blind --to sheets
  sftmix generate --read_blind sheets/sheet.csv                     the filled sheet, with the sign test

docs/evaluation.md shows how the official judges take these files."""


def add_options(parser: argparse.ArgumentParser) -> None:
    default = AnswerOptions()
    parser.add_argument("place", nargs="?", metavar="RUN_OR_MODEL", help="run directory, model directory or hub id")
    rows = "file, directory or hub id of prompts, in the format of training rows or of the tool [held-out rows]"
    parser.add_argument("--prompts", nargs="+", default=[], metavar="FILE", help=rows)
    parser.add_argument("--to", metavar="PATH", help="file to write; of other formats than rows a directory")
    names = "target, baseline, base, and other runs and models, with commas between them [%(default)s]"
    parser.add_argument("--models", default="target", metavar="NAMES", help=names)
    listed = "; ".join(f"{name} - {about}" for name, about in FORMATS.items())
    parser.add_argument("--format", choices=FORMATS, default="rows", help=f"{listed} [%(default)s]")
    add_sampling(parser)
    parser.add_argument("--batch_size", type=int, default=default.batch_size, metavar="N", help="[%(default)s]")
    parser.add_argument("--read_blind", nargs="+", metavar="SHEET", help="filled sheets: print the table and stop")
    parser.add_argument("--key", metavar="FILE", help="key.json of the sheets [beside the first sheet]")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command with answers takes."""
    default = AnswerOptions()
    most = "most tokens of an answer [%(default)s]"
    parser.add_argument("--max_new_tokens", type=int, default=default.max_new_tokens, metavar="N", help=most)
    heat = "0 takes the likeliest token [0; mt_bench: as FastChat, by the category]"
    parser.add_argument("--temperature", type=float, metavar="X", help=heat)
    top = "draw from the likeliest tokens with this share of the probability [%(default)s]"
    parser.add_argument("--top_p", type=float, default=default.top_p, metavar="X", help=top)
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="seed of the draws [%(default)s]")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; auto: as stored [%(default)s]")
    parser.add_argument("--system", metavar="TEXT", help="system turn before conversations that have none")


def sampling(given: argparse.Namespace) -> AnswerOptions:
    """Return the options of answers on a command line."""
    known = (option.name for option in fields(AnswerOptions))
    return AnswerOptions(**{name: getattr(given, name) for name in known if hasattr(given, name)})


def main(argv: Sequence[str]) -> None:
    """Answer, and say what happened; or read filled sheets."""
    given = read_words("generate", ABOUT, add_options, argv)
    if given.key is not None and not given.read_blind:
        raise ConfigError(f"--key is {given.key}, but it belongs to --read_blind SHEET")
    if given.read_blind:
        kept = ("read_blind", "key")
        refuse_others("--read_blind", given, add_options, kept=kept, reason="sheets are only read")
        from sftmix.tools.answers.blind import read_blind, table

        key = None if given.key is None else Path(given.key)
        print(table(*read_blind([Path(sheet) for sheet in given.read_blind], key)))
        return
    if given.place is None or given.to is None:
        missing = "RUN_OR_MODEL" if given.place is None else "--to"
        raise ConfigError(f"generate needs {missing}; see sftmix generate --help")
    from sftmix.tools.answers.generate import generate, told

    names = [name.strip() for name in given.models.split(",") if name.strip()]
    say(f"generate: {', '.join(names)} of {given.place}")
    made = generate(
        given.place, Path(given.to), models=names, prompts=given.prompts, form=given.format, options=sampling(given)
    )
    say("\n".join(told(made)))
    for path in made.files:
        print(path)
