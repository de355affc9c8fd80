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

Line = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A tool that judges answers.

    file      of a model, in the directory --to, with {} for the model's name
    question  a row of its questions -> the question; KeyError for a key that is missing, BadRow for another value
    line      question, texts of its answers and name of the model -> what the file of the model says
    """

    file: str
    question: Callable[[Mapping[str, Any]], Question]
    line: Callable[[Question, Sequence[str], str], Line]


def write_answers(path: Path, tool: Tool, questions: Sequence[Question], turns: Sequence[Sequence[str]]) -> None:
    """Write the file of a model, whose name is that of the file: JSON lines, or a list where the file ends in .json.

    turns  the texts of each question's answers; "" where the prompt is too long
    """
    lines = [tool.line(question, texts, path.stem) for question, texts in zip(questions, turns, strict=True)]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    if path.suffix == ".json":
        text = json.dumps(lines, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text)


def _text(value: Any, what: str) -> str:
    """Return a text of a question; BadRow for what is none, and for one without a word."""
    if not checked_text(value, what).strip():
        raise BadRow(f"{what} is empty")
    return str(value)


def _alpaca_eval(row: Mapping[str, Any]) -> Question:
    asked, dataset = _text(row["instruction"], "instruction"), str(row.get("dataset", ""))
    messages = ({"role": "user", "content": asked},)
    name = f"{stable_hash(asked, dataset):032x}"
    return Question(name, messages, row.get("output"), extra={"dataset": dataset})


def _alpaca_eval_line(question: Question, texts: Sequence[str], model: str) -> Line:
    instruction = question.messages[-1]["content"]
    return {"instruction": instruction, "output": texts[0], "generator": model, "dataset": question.extra["dataset"]}


def _mt_bench(row: Mapping[str, Any]) -> Question:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"turns is {quoted(turns)}; expected a list of texts")
    first, *later = (_text(turn, f"turns[{place}]") for place, turn in enumerate(turns))
    messages = ({"role": "user", "content": first},)
    name, temperature = checked_id(row["question_id"], "question_id"), FASTCHAT.get(str(row["category"]), 0.7)
    return Question(name, messages, None, tuple(later), temperature, {"question_id": row["question_id"]})


def _mt_bench_line(question: Question, texts: Sequence[str], model: str) -> Line:
    return {
        "question_id": question.extra["question_id"],
        "answer_id": f"{stable_hash(model, question.id, *texts):032x}",
        "model_id": model,
        "choices": [{"index": 0, "turns": list(texts)}],
        "tstamp": 0.0,  # a clock would make another file of the same answers
    }


TOOLS = {
    "alpaca_eval": Tool("{}.json", _alpaca_eval, _alpaca_eval_line),
    "mt_bench": Tool("model_answer/{}.jsonl", _mt_bench, _mt_bench_line),
}
"""The tools by the name that --format takes."""
