"""Formats of official judges: the questions of a tool, and the files of answers that it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.files import write_text
from sftmix.common.shown import quoted
from sftmix.data.formats import BadRow
from sftmix.tools.answers.questions import Question

FASTCHAT = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
"""FastChat's temperatures by category (llm_judge/common.py); writing, roleplay and other categories get 0.7 there."""


def of_mt_bench(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the row of a question in a format of training data, and more fields of the Question."""
    turns = row["turns"]
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
        raise BadRow(f"turns is {quoted(turns)}; expected a list of texts")
    first, *later = turns
    temperature = FASTCHAT.get(row["category"], 0.7)
    return {"id": row["question_id"], "prompt": first}, {"follow_ups": tuple(later), "temperature": temperature}


def write_answers(form: str, to: Path, model: str, questions: Sequence[Question], turns: Sequence[list[str]]) -> Path:
    """Write the file of a model for AlpacaEval or MT-Bench into a directory, and return it.

    turns  of each question the texts of its answers, "" where the prompt is too long
    """
    answered = zip(questions, turns, strict=True)
    if form == "alpaca_eval":
        file = to / f"{model}.json"
        rows = [{**question.row, "output": texts[0], "generator": model} for question, texts in answered]
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    else:
        file, text = to / "model_answer" / f"{model}.jsonl", ""
        for question, texts in answered:
            line = {"question_id": question.row["question_id"], "model_id": model}
            line["choices"] = [{"index": 0, "turns": texts}]
            text += json.dumps(line, ensure_ascii=False) + "\n"
    write_text(file, text)
    return file
