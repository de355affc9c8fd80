"""Questions for models, read from rows of any format or of a tool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sftmix.common.errors import DataError
from sftmix.data.conversations import content_hash
from sftmix.data.formats import BadRow, Columns, convert
from sftmix.data.sources import expand
from sftmix.types import Example

OPTION = "--prompts"
OfTool = Callable[[Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that a model continues.

    id           the row's own id, or a hash of its content (`#k` for the k-th question of this id)
    messages     turns {role: ..., content: ...}, the last one of the user
    reference    the answer that the row has; None if it has none
    follow_ups   turns of the user that come after the model's own answers, one after the other
    temperature  of its answers, where the option does not say; 0 is greedy
    row          the row that it was read from
    """

    id: str
    messages: tuple[dict[str, str], ...]
    reference: str | None = None
    follow_ups: tuple[str, ...] = ()
    temperature: float = 0.0
    row: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return what makes the question this one, in types that JSON can write."""
        more = {"follow_ups": list(self.follow_ups)} if self.follow_ups else {}
        return {"id": self.id, "messages": list(self.messages), "reference": self.reference, **more}


def question_of(example: Example) -> Question:
    """Make the question of a conversation: all turns before the last answer, which is the reference."""
    *before, last = example.messages
    messages = tuple({"role": turn.role, "content": turn.content} for turn in before)
    return Question(example.id or content_hash(example.messages), messages, last.content or None)


def read_questions(
    names: Sequence[str], columns: Mapping[str, str] | None = None, of_tool: OfTool | None = None
) -> list[Question]:
    """Read the questions of files, directories and hub ids, in file order; answers may be missing.

    columns  data.columns of a run; a row without these fields keeps its own
    of_tool  None for rows in any format of training data; else a row -> such a row, and more fields of the Question
    Raises DataError that names the first bad row as `file:line: reason`.
    """
    reader, questions, times = Columns(columns), list[Question](), Counter[str]()
    for source in expand(names, OPTION):
        for place, row in source.rows():
            try:
                if not isinstance(row, dict):
                    raise row if isinstance(row, BadRow) else BadRow("expected an object with named fields")
                plain, more = of_tool(row) if of_tool else (row, {})
                plain = _with_answer(reader.renamed(plain))
                question = replace(question_of(convert(plain, "auto", first=reader.formats)), row=row, **more)
            except (KeyError, BadRow) as problem:
                reason = f"it has no {problem}" if isinstance(problem, KeyError) else problem
                raise DataError(f"{OPTION}: {place}: {reason}") from problem
            times[question.id] += 1
            again = times[question.id]
            questions.append(replace(question, id=f"{question.id}#{again}") if again > 1 else question)
    if not questions:
        raise DataError(f"{OPTION}: {', '.join(names)}: there is no row; name a file with questions")
    return questions


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row that only asks an empty answer, so that the formats of training rows read it."""
    empty = {"role": "assistant", "content": ""}
    if "instruction" in row:
        return {"output": "", **row}
    if "prompt" in row:
        return {"completion": [empty] if isinstance(row["prompt"], list) else "", **row}
    for key in ("messages", "conversations"):
        last = row[key][-1] if isinstance(row.get(key), list) and row[key] else None
        if isinstance(last, dict) and last.get("role", last.get("from")) in ("user", "human"):
            return {**row, key: [*row[key], empty]}
    return row
