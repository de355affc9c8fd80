"""The report on the rows of a run: what was read, dropped, cut and composed, by reason."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

from sftmix.words.shown import as_lines, counted

NAMED = 5
"""Cases of each reason that the report names; the others are counted."""

ALL_BAD = "sftmix preview --bad FILE names all"
"""What a report says if it names only the first bad rows."""

UNREAD = "unread"
"""The reason of a field that is not read, which a report counts by the field."""
REASONS = {
    "bad_row": "bad row{s} skipped (data.skip_bad)",
    "excluded": "row{s} left out (data.exclude)",
    "many_lines": "row{s} of CSV over more than 50 lines (an open quote makes the rows behind it one answer)",
    "duplicate": "row{s} with the same content as an earlier row (kept; data.duplicates drop leaves them out)",
    "dropped_duplicate": "row{s} with the same content as an earlier row left out (data.duplicates)",
    "system": "row{s} with a system turn",
    "thought": "row{s} with a thought before the answer (data.thoughts)",
    "empty_response": "empty response{s} dropped",
    "unanswered": "last turn{s} without an answer, dropped",
    "empty_document": "empty document{s} dropped",
    "no_target": "window{s} dropped: a single token is in it, which nothing predicts",
    "no_response_token": "example{s} dropped: no trained token of a response within data.max_length = {length}",
    "template_refused": "example{s} dropped: the chat template refuses the conversation",
    "tools_lost": "example{s} dropped: the chat template does not write the functions, or a function's result",
    "calls_lost": "example{s} dropped: the chat template does not write a call of a function as the row has it",
    "prefix_mismatch": "example{s} dropped: the prompt's tokens are not where the example's tokens begin",
    "no_end_of_turn": "example{s} dropped: the rendered response does not end with a stop token",
    "truncated": "example{s} cut at data.max_length = {length} (trained without an end-of-turn token)",
    "boundary": "example{s} with a response tokenised apart from the prompt (a token would span both)",
    "composed": "example{s} with a response that we put behind the prompt (the template leaves out a part of it, or "
    "does not go on from its own prompt)",
    "turn_lost": "example{s} with a turn that the chat template leaves out of the prompt",
    "weighted": "example{s} with a weight other than 1 (the field weight of the row, of a turn, or of a part)",
    "split_turns": "conversation{s} trained as one example per turn (no one sequence holds the prompt of every turn)",
    "split_alone": "conversation{s} not scored: split by this template, not by the target's (with data.multi_turn "
    "per_turn all templates give the same examples)",
    "spelt_special": "example{s} with the spelling of a special token, encoded as text (data.special_tokens)",
    "spelt_in_document": "document{s} with the spelling of a special token, encoded as text (data.special_tokens)",
    "eval_in_train": "held-out row{s} with content that also occurs in the training rows",
}
"""Every reason that the report counts, with its words there; {s} is the plural, {length} data.max_length."""


class Case(NamedTuple):
    """One row, or what it became, that is reported.

    source  its place, `file:line`
    id      "" for a row without one
    detail  what else is said of it, from a colon on, or ""
    """

    source: str
    id: str = ""
    detail: str = ""

    def __str__(self) -> str:
        # c1 (rows.jsonl:3); rows.jsonl:4: instruction is empty; rows.jsonl:5
        return f"{self.id} ({self.source}){self.detail}" if self.id else f"{self.source}{self.detail}"


_heard: ContextVar[list[tuple[str, Case]] | None] = ContextVar("_heard", default=None)


@contextmanager
def every_case() -> Iterator[list[tuple[str, Case]]]:
    """Yield a list that every case joins, with its reason, while rows are read: a report names the first alone.

    Rows that a cache has are not read.
    """
    cases = list[tuple[str, Case]]()
    token = _heard.set(cases)
    try:
        yield cases
    finally:
        _heard.reset(token)


def hear(reason: str, case: Case) -> None:
    """Add a case to the list of `every_case`, if there is one."""
    if (cases := _heard.get()) is not None:
        cases.append((reason, case))


@dataclass
class DataReport:
    """Counts over the rows of one data set.

    rows          rows read from all files, with the bad ones; for text: documents
    train, eval   examples of each side (a row of k assistant turns gives up to k); for text: windows
    counts        reason (a key of REASONS) -> how many
    first         reason -> the first NAMED of them, as a Case is written
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

    def add(self, reason: str, case: Case) -> None:
        """Count a case of `reason`, and name it if it is among the first."""
        hear(reason, case)
        self._count(reason, 1, [str(case)])

    def _count(self, reason: str, count: int, names: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first[reason] = [*self.first.get(reason, []), *names][:NAMED]

    def take(self, other: Self) -> None:
        """Add the rows, counts and notes of another."""
        self.rows += other.rows
        self.notes += other.notes
        for reason, count in other.counts.items():
            self._count(reason, count, other.first[reason])

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON can write; `DataReport(**d)` reads it back."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people, one line per fact; text from rows and templates cannot add one.

        Bad rows have a line each, behind two spaces.
        """
        kind = "row"
        examples = "examples"
        if self.tokens is not None:
            kind = "document"
            sizes = "{:,} and {:,} tokens".format(*self.tokens)
            examples = f"windows of at most {self.max_length:,} tokens ({sizes})"
        sides = f"{self.train:,} training and {self.eval:,} held-out {examples}"
        lines = [*self.notes, f"{counted(self.rows, kind)} read: {sides}"]
        for reason, text in REASONS.items():
            if count := self.counts.get(reason):
                text = text.format(s="" if count == 1 else "s", length=self.max_length)
                names = self.first[reason] + ["..."] * (count > NAMED)
                if reason == "bad_row":
                    rest = f"; {ALL_BAD}" if count > NAMED else ""
                    lines += [f"{count:,} {text}{rest}:", *(f"  {name}" for name in self.first[reason])]
                else:
                    lines.append(f"{count:,} {text}: {', '.join(names)}")
        return [as_lines(line, but="") for line in lines]
