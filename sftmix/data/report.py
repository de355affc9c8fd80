"""The report on the rows: counts of the rows read, dropped, cut or refused, and the names of the first few."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from sftmix.common.errors import DataError

NAMED = 5
"""Cases of each reason that the report names; the others are counted."""

SHOWN = 20
"""Bad rows that an error message lists; the others are counted."""

HELD_OUT_BEFORE = (
    "the held-out rows were chosen before that, so that they are the same for every limit "
    "(data.take leaves rows out before any are held out)"
)
"""End of a note on data.limit where data.eval_fraction is set, too."""

REASONS = {
    "bad_row": "bad rows skipped (data.skip_bad)",
    "duplicate": "rows with the same content as an earlier row (kept; their ids end in #k)",
    "empty_response": "empty responses dropped",
    "empty_document": "empty documents dropped",
    "no_target": "windows dropped: they hold no token that one before it predicts",
    "no_response_token": "examples dropped: no response token left within data.max_length",
    "template_refused": "examples dropped: the chat template refuses the conversation",
    "prefix_mismatch": "examples dropped: the prompt's tokens are not where the example's tokens begin",
    "no_end_of_turn": "examples dropped: the rendered response does not end with a stop token",
    "truncated": "examples cut at data.max_length (trained without an end-of-turn token)",
    "boundary": "examples whose response was tokenised apart from the prompt (a token would span both)",
    "composed": "examples whose response was appended to the prompt (the template rewrites earlier turns)",
    "split_turns": "conversations trained as one example per turn (the template rewrites earlier turns)",
    "eval_in_train": "held-out rows whose content also occurs in the training rows",
}
"""Every reason that the report counts, with its words there."""


@dataclass
class DataReport:
    """Counts over the rows of one data set.

    rows          rows read from all files, with the bad ones; for text: documents
    train, eval   examples of each side (a row of k assistant turns gives up to k); for text: windows
    counts        reason (a key of REASONS) -> how many
    first         reason -> the first NAMED of them, as `id (source)` or `source: reason`
    notes         remarks, for example on the template in use
    max_length    tokens per example
    tokens        for text: the tokens of each side; else None
    """

    rows: int = 0
    train: int = 0
    eval: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    max_length: int | None = None
    tokens: tuple[int, int] | None = None

    def add(self, reason: str, name: str) -> None:
        """Count one case of `reason`."""
        assert reason in REASONS, reason
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.first.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(name)

    def merge(self, others: Iterable[DataReport]) -> DataReport:
        """Make a new report with the counts of all; train, eval and max_length are those of this one."""
        total = deepcopy(self)
        for other in others:
            total.rows += other.rows
            total.notes += [note for note in other.notes if note not in total.notes]
            total.take(other)
        return total

    def take(self, other: DataReport) -> None:
        """Add the counts of another."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first[reason] = (self.first.get(reason, []) + other.first.get(reason, []))[:NAMED]

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON can write; `DataReport(**d)` reads it back."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people, one line per fact."""
        out = list(self.notes)
        out.append(self._totals())
        for reason, text in REASONS.items():
            if count := self.counts.get(reason):
                if self.max_length is not None:
                    text = text.replace("data.max_length", f"data.max_length = {self.max_length}")
                names = self.first[reason]
                more = ", ..." if count > len(names) else ""
                out.append(f"{count:,} {text}: {', '.join(names)}{more}")
        return out

    def _totals(self) -> str:
        if self.tokens is None:
            return f"{self.rows:,} rows read: {self.train:,} training and {self.eval:,} held-out examples"
        return (
            f"{self.rows:,} documents read: {self.train:,} training and {self.eval:,} held-out windows of at most "
            f"{self.max_length:,} tokens ({self.tokens[0]:,} and {self.tokens[1]:,} tokens)"
        )


class BadRows:
    """The first SHOWN bad rows with their reasons, and the count of all."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, source: str, reason: str) -> None:
        """Count a bad row at `source` (`file:line`)."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{source}: {reason}")

    def settle(self, report: DataReport, skip_bad: bool, note: str = "") -> None:
        """Count the bad rows into the report; raise DataError if there are any and `skip_bad` is False.

        note  a remark for the message, on how the rows were read
        """
        if self.count and not skip_bad:
            more = [f"... and {self.count - len(self.first):,} more"] if self.count > len(self.first) else []
            head = f"{self.count:,} bad row{'s' if self.count > 1 else ''} (data.skip_bad drops and counts them):"
            raise DataError("\n".join([head, *self.first, *more, *([note] if note else [])]))
        for line in self.first:
            report.add("bad_row", line)
        if self.count:
            report.counts["bad_row"] = self.count
