"""Formats of official judges: the questions of a tool, and the files of answers that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.files import write_text
from sftmix.common.rng import stable_hash
from sftmix.common.shown import quoted
from sftmix.data.formats import checked_id, checked_text
from sftmix.data.jsonrows import BadRow
from sftmix.tools.answers.questions import Question

FASTCHAT = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
"""FastChat's temperatures by category (llm_judge/common.py); writing, roleplay and other categories get 0.7 there."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """A tool that judges answers.

    file      of a model, in the directory --to, with {} for the model's name
    question  a row of its questions -> the question; KeyError for a key that is missing, BadRow for another value
    line      the row, texts of its answers ("" where the prompt is too long), name of the model -> line of the file
    """

    file: str
    question: Callable[[Row], Question]
    line: Callable[[Row, Sequence[str], str], Row]


def write_answers(path: Path, tool: Tool, questions: Sequence[Question], turns: Sequence[Sequence[str]]) -> None:
    """Write the file of a model, whose name is that of the file: JSON lines, or a list where the file ends in .json."""
    lines = [tool.line(question.row, texts, path.stem) for question, texts in zip(questions, turns, strict=True)]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    if path.suffix == ".json":
        text = json.dumps(lines, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text)


def _alpaca_eval(row: Row) -> Question:
    asked = checked_text(row["instruction"], "instruction")
    name = f"{stable_hash(asked, str(row.get('dataset', ''))):032x}"
    return Question(name, ({"role": "user", "content": asked},), row.get("output"), row=row)


def _alpaca_eval_line(row: Row, texts: Sequence[str], model: str) -> Row:
    dataset = str(row.get("dataset", ""))
    return {"instruction": row["instruction"], "output": texts[0], "generator": model, "dataset": dataset}


def _mt_bench(row: Row) -> Question:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"turns is {quoted(turns)}; expected a list of texts")
    first, *later = (checked_text(turn, f"turns[{place}]") for place, turn in enumerate(turns))
    name, temperature = checked_id(row["question_id"], "question_id"), FASTCHAT.get(str(row["category"]), 0.7)
    return Question(name, ({"role": "user", "content": first},), None, tuple(later), temperature, row)


def _mt_bench_line(row: Row, texts: Sequence[str], model: str) -> Row:
    return {
        "question_id": row["question_id"],
        "answer_id": f"{stable_hash(model, str(row['question_id']), *texts):032x}",
        "model_id": model,
        "choices": [{"index": 0, "turns": list(texts)}],
        "tstamp": 0.0,  # a clock would make another file of the same answers
    }


TOOLS = {
    "alpaca_eval": Tool("{}.json", _alpaca_eval, _alpaca_eval_line),
    "mt_bench": Tool("model_answer/{}.jsonl", _mt_bench, _mt_bench_line),
}
"""The tools by the name that --format takes."""
