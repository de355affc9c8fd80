"""Answers on disk while they are made: killed at any moment, they are continued, and end the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.files import read_batches
from sftmix.tools.answers.questions import Question

Key = tuple[str, str, int]
"""The name of a model, the id of a question, and the turn from 0."""
Answer = dict[str, Any]
"""key, and the columns below: the text (None if the prompt leaves no room in the model's context), how it
ended (stop, length, prompt_too_long), and numbers of tokens."""
COLUMNS = ("answers", "finish", "prompt_tokens", "answer_tokens")


def read_answers(file: Path) -> dict[Key, Answer]:
    """Return the answers so far."""
    return {tuple(answer["key"]): answer for answer in read_batches(file)}


def lines_of(
    questions: Sequence[Question], models: Sequence[str], answers: Mapping[Key, Answer]
) -> list[dict[str, Any]]:
    """Put the answers of all models beside one another, in the order of the questions.

    With follow-ups each model has a list of values, one for each turn, in place of one.
    """
    lines = []
    for question in questions:
        line, turns = question.plain(), range(1 + len(question.follow_ups))
        for column in COLUMNS:
            values = {m: [answers[m, question.id, turn][column] for turn in turns] for m in models}
            line[column] = values if question.follow_ups else {m: value for m, (value,) in values.items()}
        lines.append(line)
    return lines
