"""The report on the rows: counts of the rows read, dropped, cut or refused, and the names of the first few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from sftmix.common.errors import DataError
from sftmix.common.fields import SHOWN_FIELDS, listed
from sftmix.common.figures import counted
from sftmix.common.shown import one_line
from sftmix.data.jsonrows import BadRow

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
    "bad_row": "bad row{s} skipped (data.skip_bad)",
    "duplicate": "row{s} with the same content as an earlier row (kept, with #k at the end of the id)",
    "empty_response": "empty response{s} dropped",
    "empty_document": "empty document{s} dropped",
    "no_target": "window{s} dropped: no token there that one before it predicts",
    "no_response_token": "example{s} dropped: no response token left within data.max_length",
    "template_refused": "example{s} dropped: the chat template refuses the conversation",
    "prefix_mismatch": "example{s} dropped: the prompt's tokens are not where the example's tokens begin",
    "no_end_of_turn": "example{s} dropped: the rendered response does not end with a stop token",
    "truncated": "example{s} cut at data.max_length (trained without an end-of-turn token)",
    "boundary": "example{s} with a response tokenised apart from the prompt (a token would span both)",
    "composed": "example{s} with a response appended to the prompt (the template rewrites earlier turns)",
    "own_block": "example{s} prompted without the empty block, as by enable_thinking=true (the response has its own)",
    "split_turns": "conversation{s} trained as one example per turn (the template rewrites earlier turns)",
    "split_alone": "conversation{s} not scored: split by this template, not by the target's (see data.multi_turn)",
    "spelt_special": "example{s} with the spelling of a special token, encoded as text (data.special_tokens)",
    "spelt_in_document": "document{s} with the spelling of a special token, encoded as text (data.special_tokens)",
    "eval_in_train": "held-out row{s} with content that also occurs in the training rows",
}
"""Every reason that the report counts, with its words there; {s} is the plural."""


@dataclass
class DataReport:
    """Counts over the rows of one data set.

    rows          rows read from all files, with the bad ones; for text: documents
    train, eval   examples of each side (a row of k assistant turns gives up to k); for text: windows
    counts        reason (a key of REASONS) -> how many
    first         reason -> the first NAMED of them, as `id (source)` or `source: reason`
    kinds         reason -> kind of the case -> how many, for the reasons that have kinds
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
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    max_length: int | None = None
    tokens: tuple[int, int] | None = None

    def add(self, reason: str, name: str, kinds: Iterable[str] = ()) -> None:
        """Count one case of `reason`, which may be of several kinds."""
        assert reason in REASONS, reason
        one = {reason: dict.fromkeys(kinds, 1)} if kinds else {}
        self.take(DataReport(counts={reason: 1}, first={reason: [name]}, kinds=one))

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
        for reason, kinds in other.kinds.items():
            self.kinds[reason] = dict(Counter(self.kinds.get(reason, {})) + Counter(kinds))

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON can write; `DataReport(**d)` reads it back."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people, one line per fact; what comes from rows and templates cannot add one."""
        out = list(self.notes)
        total = f"{counted(self.rows, 'row')} read: {self.train:,} training and {self.eval:,} held-out examples"
        if self.tokens is not None:
            total = (
                f"{counted(self.rows, 'document')} read: {self.train:,} training and {self.eval:,} held-out windows of "
                f"at most {self.max_length:,} tokens ({self.tokens[0]:,} and {self.tokens[1]:,} tokens)"
            )
        out.append(total)
        for reason, text in REASONS.items():
            if count := self.counts.get(reason):
                text = text.replace("{s}", "" if count == 1 else "s")
                if self.max_length is not None:
                    text = text.replace("data.max_length", f"data.max_length = {self.max_length}")
                kinds = sorted(self.kinds.get(reason, {}).items(), key=lambda item: (-item[1], item[0]))
                words = [text, *(f"{kind} in {number:,}" for kind, number in kinds[:SHOWN])]
                words += [f"{len(kinds) - SHOWN:,} others"] if len(kinds) > SHOWN else []
                names = self.first[reason] + ["..."] * (count > len(self.first[reason]))
                out.append(f"{count:,} {', '.join(words)}: {', '.join(names)}")
        return [one_line(line) for line in out]


class BadFile:
    """The bad rows of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = self.count = 0
        self.first: list[str] = []
        self._reason = ""
        self._mistakes: set[str] = set()
        self._fields: dict[str, None] = {}

    def add(self, place: str, problem: BadRow, row: Any) -> None:
        """Count a bad row at `place` (`file:line`); `row` is what was read."""
        self.count += 1
        self._reason = self._reason or str(problem)
        if len(self._mistakes) < 2:
            self._mistakes.add(problem.mistake)
        if len(self.first) < SHOWN:
            self.first.append(f"{problem.source or place}: {problem}")
        if isinstance(row, Mapping) and len(self._fields) <= SHOWN_FIELDS:
            self._fields.update(dict.fromkeys(row))

    def lines(self) -> list[str]:
        """The bad rows; one line instead if all rows of the file, or more than SHOWN, have the same mistake."""
        if self.count < 2 or len(self._mistakes) > 1 or (self.count < self.rows and self.count <= SHOWN):
            return self.first
        if self.count < self.rows:
            return [f"{self.first[0]}; {self.count - 1:,} later rows of this file have the same mistake"]
        fields = listed(self._fields)
        there = f"; the fields there are {fields}" if self._fields and fields not in self._reason else ""
        return [f"{self.name}: all {self.rows:,} rows: {self._reason}{there}"]


class BadRows:
    """The first SHOWN lines about bad rows, and the count of all."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        self._told = 0

    def add(self, lines: list[str], count: int) -> None:
        """Count bad rows, told by one line each, or by one line for all of them."""
        self.count += count
        shown = lines[: SHOWN - len(self.first)]
        self.first += shown
        self._told += count if len(shown) == len(lines) == 1 else len(shown)

    def settle(self, report: DataReport, skip_bad: bool, note: str = "") -> None:
        """Count the bad rows into the report; raise DataError if there are any and `skip_bad` is False.

        note  a remark for the message, on how the rows were read
        """
        if self.count and not skip_bad:
            more = [f"... and {self.count - self._told:,} more"] if self.count > self._told else []
            head = f"{self.count:,} bad row{'s' if self.count > 1 else ''} (data.skip_bad drops and counts them):"
            raise DataError("\n".join([head, *self.first, *more, *([note] if note else [])]))
        for line in self.first:
            report.add("bad_row", line)
        if self.count:
            report.counts["bad_row"] = self.count
