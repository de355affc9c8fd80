"""The options of an answer, and which of them make answers what they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sftmix.options import at_least_1, out_of_range

FORMATS = {
    "rows": "one line for each prompt, with the answers of all models; prompts are rows of any format",
    "alpaca_eval": "AlpacaEval: MODEL.json for each model; prompts are a file of outputs, such as the reference's",
    "mt_bench": "MT-Bench: model_answer/MODEL.jsonl as FastChat writes it; prompts are its question.jsonl",
    "ifeval": "IFEval: MODEL.jsonl for each model; prompts are its input_data.jsonl",
    "arena_hard": "Arena-Hard 2: model_answer/MODEL.jsonl; prompts are its question.jsonl",
    "blind": "raters: sheet.csv with two models' answers as A and B in random order, and key.json for --read_blind",
}
"""The names that --format takes, and what each is; kept apart from the formats, as help needs no library."""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How models answer.

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

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each option that is out of its range."""
        checks = (
            ("max_new_tokens", at_least_1, "at least 1"),
            ("temperature", lambda value: 0 <= value <= 10, "0 (greedy) to 10"),
            ("top_p", lambda value: 0 < value <= 1, "above 0, at most 1"),
            ("batch_size", at_least_1, "at least 1"),
        )
        for problem in out_of_range("", self, checks):
            yield f"--{problem.removeprefix('.')}"

    def at(self, own: float) -> float:
        """Return the temperature of a question whose own is `own`."""
        return own if self.temperature is None else self.temperature

    def unused(self, temperatures: Iterable[float]) -> Iterator[str]:
        """Yield a sentence for an option that changes nothing.

        temperatures  the questions' own
        """
        if self.top_p < 1 and not any(self.at(own) > 0 for own in temperatures):
            given = "it is not given, which means 0" if self.temperature is None else f"it is {self.temperature:g}"
            yield (
                f"--top_p is {self.top_p:g}, and nothing is drawn without a --temperature above 0 ({given}); give a "
                "--temperature, or leave --top_p out"
            )

    def identity(self) -> dict[str, Any]:
        """Return the options on which the answers depend."""
        kept = ("max_new_tokens", "temperature", "top_p", "seed", "dtype", "system")
        return {name: getattr(self, name) for name in kept}
