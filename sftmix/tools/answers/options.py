"""The options of an answer, for the commands that make some; their help needs no library."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from sftmix.common.errors import refuse
from sftmix.options import at_least_1, out_of_range


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How models answer; ConfigError for an option that is out of its range.

    max_new_tokens  most tokens of an answer
    temperature     divisor of the logits; 0 takes the likeliest token; None: 0, or what the format says of a question
    top_p           only the likeliest tokens that hold this share of the probability are drawn; 1: all
    seed            of the draws
    batch_size      prompts that are answered at once; it changes no token where sums do not depend on it
    dtype           of the weights, auto: as they are stored
    system          system turn before conversations that have none
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 42
    batch_size: int = 16
    dtype: str = "auto"
    system: str | None = None

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", at_least_1, "at least 1"),
            ("temperature", lambda value: 0 <= value <= 10, "0 (greedy) to 10"),
            ("top_p", lambda value: 0 < value <= 1, "above 0, at most 1"),
            ("batch_size", at_least_1, "at least 1"),
        )
        refuse([f"--{problem[1:]}" for problem in out_of_range("", self, checks)], "the options of answers")

    def at(self, own: float) -> float:
        """Return the temperature of a question whose own is `own`."""
        return own if self.temperature is None else self.temperature


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command with answers takes."""
    for name, kind, metavar, about in (
        ("max_new_tokens", int, "N", "most tokens of an answer [%(default)s]"),
        ("temperature", float, "X", "0 takes the likeliest token [0; mt_bench: as FastChat, by the category]"),
        ("top_p", float, "X", "draw from the likeliest tokens with this share of the probability [%(default)s]"),
        ("seed", int, "N", "seed of the draws [%(default)s]"),
        ("system", str, "TEXT", "system turn before conversations that have none"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(AnswerOptions, name), metavar=metavar, help=about)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; auto: as stored [%(default)s]")


def sampling(given: argparse.Namespace) -> AnswerOptions:
    """Return the options of answers on a command line."""
    values = vars(given)
    return AnswerOptions(**{one.name: values[one.name] for one in fields(AnswerOptions) if one.name in values})
