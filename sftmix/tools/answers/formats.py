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


def _asked(value: Any, what: str) -> tuple[dict[str, str], ...]:
    """Return the messages of a question; BadRow for what is no text, and for one without a word."""
    if not checked_text(value, what).strip():
        raise BadRow(f"{what} is empty")
    return ({"role": "user", "content": value},)


def _alpaca_eval(row: Mapping[str, Any]) -> Question:
    messages = _asked(row["instruction"], "instruction")
    dataset = str(row.get("dataset", ""))
    name = f"{stable_hash(row['instruction'], dataset):032x}"
    return Question(name, messages, row.get("output"), extra={"dataset": dataset})


def _alpaca_eval_line(question: Question, texts: Sequence[str], model: str) -> Line:
    instruction = question.messages[-1]["content"]
    return {"instruction": instruction, "output": texts[0], "generator": model, "dataset": question.extra["dataset"]}


def _mt_bench(row: Mapping[str, Any]) -> Question:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"turns is {quoted(turns)}; expected a list of texts")
    messages, *later = (_asked(turn, f"turns[{place}]") for place, turn in enumerate(turns))
    temperature = FASTCHAT.get(str(row["category"]), 0.7)
    follow_ups = tuple(turn["content"] for (turn,) in later)
    name = checked_id(row["question_id"], "question_id")
    return Question(name, messages, None, follow_ups, temperature, {"question_id": row["question_id"]})


def _mt_bench_line(question: Question, texts: Sequence[str], model: str) -> Line:
    return {
        "question_id": question.extra["question_id"],
        "answer_id": f"{stable_hash(model, question.id, *texts):032x}",
        "model_id": model,
        "choices": [{"index": 0, "turns": list(texts)}],
        "tstamp": 0.0,  # a clock would make another file of the same answers
    }


def _prompted(key: str) -> Callable[[Mapping[str, Any]], Question]:
    """Return what makes a question of a row with an id under this key, and a prompt."""
    return lambda row: Question(checked_id(row[key], key), _asked(row["prompt"], "prompt"))


def _ifeval_line(question: Question, texts: Sequence[str], model: str) -> Line:
    return {"prompt": question.messages[-1]["content"], "response": texts[0]}


def _arena_hard_line(question: Question, texts: Sequence[str], model: str) -> Line:
    return {
        "uid": question.id,
        "ans_id": f"{stable_hash(model, question.id, *texts):032x}",
        "model": model,
        "messages": [*question.messages, {"role": "assistant", "content": {"answer": texts[0]}}],
        "tstamp": 0.0,
        "metadata": {},
    }


TOOLS = {
    "alpaca_eval": Tool("{}.json", _alpaca_eval, _alpaca_eval_line),
    "mt_bench": Tool("model_answer/{}.jsonl", _mt_bench, _mt_bench_line),
    "ifeval": Tool("{}.jsonl", _prompted("key"), _ifeval_line),
    "arena_hard": Tool("model_answer/{}.jsonl", _prompted("uid"), _arena_hard_line),
}
"""The tools by the name that --format takes."""
