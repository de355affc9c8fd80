"""Questions for models, read from rows of any format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sftmix.common.errors import DataError
from sftmix.data.columns import Columns
from sftmix.data.conversations import content_hash
from sftmix.data.formats import TEXT, convert, recognise
from sftmix.data.jsonrows import BadRow
from sftmix.data.sources import expand
from sftmix.types import Example

OPTION = "--prompts"


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that a model continues.

    id          the row's own id, or a hash of its content (`#k` for the k-th repetition)
    messages    turns {role: ..., content: ...}, the last one of the user
    reference   the answer that the row has; None if it has none
    follow_ups  turns of the user that come after the model's own answers, one after the other
    temperature  of its answers, where the option does not say; 0 is greedy
    extra       fields of the row that a format writes back
    """

    id: str
    messages: tuple[dict[str, str], ...]
    reference: str | None = None
    follow_ups: tuple[str, ...] = ()
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return what makes the question this one, in types that JSON can write."""
        parts = {"id": self.id, "messages": list(self.messages), "reference": self.reference}
        return {**parts, **({"follow_ups": list(self.follow_ups)} if self.follow_ups else {})}


def with_system(questions: Iterable[Question], system: str | None) -> list[Question]:
    """Put a system turn before the questions that have none."""
    if system is None:
        return list(questions)
    turn = {"role": "system", "content": system}
    return [q if q.messages[0]["role"] == "system" else replace(q, messages=(turn, *q.messages)) for q in questions]


def question_of(example: Example) -> Question:
    """Make the question of a conversation: all turns before the last answer, which is the reference."""
    *before, last = example.messages
    messages = tuple({"role": turn.role, "content": turn.content} for turn in before)
    return Question(example.id or content_hash(example.messages), messages, last.content or None)


# -------------------------------------------------------------------------------------------- rows of files


def read_questions(names: list[str], columns: Mapping[str, str] | None = None) -> list[Question]:
    """Read the questions of files, directories and hub ids of rows, in file order; answers may be missing.

    columns  data.columns of a run; a file without these fields keeps its own
    Raises DataError that lists `file:line: reason` of the first bad rows.
    """
    reader = Columns(columns)
    usual: str | None = None
    questions, own, places = list[Question](), list[bool](), list[str]()
    for place, row in good_rows(names):
        named = _with_answer(reader.renamed(row))
        try:
            usual = recognise(named, usual, reader.formats)
            if usual == TEXT:
                raise BadRow("a text, where a question is needed; models answer conversations")
            questions.append(question_of(convert(named, usual, source=place)))
        except BadRow as problem:
            raise refused(place, problem) from problem
        own.append("id" in named)
        places.append(place)
    if not questions:
        raise no_row(names)
    return _numbered(questions, own, places)


def good_rows(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, row) of every row of these sources; raise DataError for one that is no object."""
    for source in expand(names, OPTION):
        for place, row in source.rows():
            if not isinstance(row, dict):
                problem = row if isinstance(row, BadRow) else BadRow(f"expected an object, found {type(row).__name__}")
                raise refused(place, problem) from None
            yield place, row


def refused(place: str, problem: BadRow) -> DataError:
    """Return the error that names a bad row."""
    return DataError(f"{OPTION}: {place}: {problem}")


def no_row(names: list[str]) -> DataError:
    """Return the error of sources without a row."""
    return DataError(f"{OPTION}: {', '.join(names)}: there is no row; name a file with questions")


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row that only asks an empty answer, so that the formats of training rows read it."""
    filled = dict(row)
    for asks, answers in (("instruction", "output"), ("prompt", "completion")):
        if asks in row and answers not in row:
            filled[answers] = [_EMPTY] if isinstance(row[asks], list) else ""
    for key in ("messages", "conversations"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and _asks(turns[-1]):
            filled[key] = [*turns, _EMPTY]
    return filled


def _asks(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in ("user", "human")


_EMPTY = {"role": "assistant", "content": ""}


def _numbered(questions: list[Question], own: Sequence[bool], places: Sequence[str]) -> list[Question]:
    """Number the repetitions of rows without an id; raise DataError for an id of its own that is taken."""
    seen, numbered = Counter[str](), list[Question]()
    for question, is_own, place in zip(questions, own, places, strict=True):
        times = seen[question.id]
        seen[question.id] += 1
        if times and is_own:
            raise DataError(f"{OPTION}: {place}: the id {question.id!r} is taken by an earlier row")
        numbered.append(replace(question, id=f"{question.id}#{times + 1}") if times else question)
    return numbered
