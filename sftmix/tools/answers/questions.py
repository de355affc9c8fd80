"""Questions for models, read from rows of any format or of a judge's tool, and the files of answers that tools take."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError
from sftmix.common.files import write_text
from sftmix.data.conversations import content_hash
from sftmix.data.formats import BadRow, Columns, convert
from sftmix.data.sources import expand
from sftmix.types import Example

OPTION = "--prompts"
FASTCHAT = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
"""FastChat's temperatures by category (llm_judge/common.py); writing, roleplay and other categories get 0.7 there."""


@dataclass(frozen=True)
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
    names: Sequence[str], columns: Mapping[str, str] | None = None, *, mt_bench: bool = False
) -> list[Question]:
    """Read the questions of files, directories and hub ids, in file order; answers may be missing.

    columns   data.columns of a run; a row without these fields keeps its own
    mt_bench  the rows are those of FastChat's question.jsonl, and of no format of training data
    Raises DataError that names the first bad row as `file:line: reason`.
    """
    reader, questions, times = Columns(columns), [], Counter[str]()
    for source in expand(names, OPTION):
        for place, row in source.rows():
            try:
                if not isinstance(row, dict):
                    raise row if isinstance(row, BadRow) else BadRow("expected an object with named fields")
                plain, more = _of_mt_bench(row) if mt_bench else (row, {})
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


def _of_mt_bench(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the row of a question in a format of training data, and more fields of the Question."""
    if not isinstance(row["turns"], list) or not row["turns"]:
        raise BadRow("turns must be a list of texts")
    first, *later = row["turns"]
    temperature = FASTCHAT.get(row["category"], 0.7)
    return {"id": row["question_id"], "prompt": first}, {"follow_ups": tuple(later), "temperature": temperature}


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row that only asks an empty answer, so that the formats of training rows read it."""
    empty = {"role": "assistant", "content": ""}
    if "instruction" in row:
        return {"output": "", **row}
    if "prompt" in row:
        return {"completion": [empty] if isinstance(row["prompt"], list) else "", **row}
    for key in ("messages", "conversations"):
        match row.get(key):
            case [*turns, ({"role": "user" | "human"} | {"from": "user" | "human"}) as last]:
                return {**row, key: [*turns, last, empty]}
    return row


def write_answers(form: str, to: Path, model: str, questions: Sequence[Question], turns: Sequence[list[str]]) -> Path:
    """Write the file of a model for AlpacaEval or MT-Bench into a directory, and return it.

    turns  of each question the texts of its answers, "" where the prompt is too long
    """
    answered = zip([question.row for question in questions], turns, strict=True)
    if form == "alpaca_eval":
        file = to / f"{model}.json"
        outputs = [{**row, "output": texts[0], "generator": model} for row, texts in answered]
        text = json.dumps(outputs, indent=1, ensure_ascii=False) + "\n"
    else:
        file, text = to / "model_answer" / f"{model}.jsonl", ""
        for row, texts in answered:
            line = {"question_id": row["question_id"], "model_id": model, "choices": [{"index": 0, "turns": texts}]}
            text += json.dumps(line, ensure_ascii=False) + "\n"
    write_text(file, text)
    return file
