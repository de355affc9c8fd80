"""Answers on disk while they are made: killed at any moment, they are continued, and end the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import naming_full_disk, read_json, write_json, write_text
from sftmix.pipeline.directory import differences
from sftmix.tools.answers.questions import Question

Key = tuple[str, str, int]
"""The name of a model, the id of a question, and the turn from 0."""
Answer = dict[str, Any]
"""model, id, turn, and the columns below: the text (None if the prompt leaves no room in the model's context), how it
ended (stop, length, prompt_too_long), and numbers of tokens."""
COLUMNS = ("answers", "finish", "prompt_tokens", "answer_tokens")


class AnswerFile:
    """One JSONL file with the answers of all models, a line for each question.

    Beside it lies `FILE.inputs.json`, what it is made from, and while it is made `FILE.parts`: the answers in the order
    in which they came.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts = path.with_name(f"{path.name}.parts")

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Take the file for answers made from `inputs`; raise ConfigError if it was made, or begun, from others."""
        file = self.path.with_name(f"{self.path.name}.inputs.json")
        if not (self.path.exists() or file.exists()):
            write_json(file, inputs)
        old = read_json(file) if file.exists() else {}  # {}: not written by this command
        if different := differences(old, inputs):
            problem = f"{self.path} was made with other inputs: {'; '.join(different[:8])}"
            raise ConfigError(f"{problem}. Use another --to, or the old settings")

    def read(self) -> dict[Key, Answer]:
        """Return the answers so far, and drop a last line that was cut short."""
        if not self._parts.exists():
            return {}
        whole, newline, _ = self._parts.read_bytes().rpartition(b"\n")
        os.truncate(self._parts, len(whole) + len(newline))
        answers = map(json.loads, whole.splitlines())
        return {(answer["model"], answer["id"], answer["turn"]): answer for answer in answers}

    def append(self, answers: Sequence[Answer]) -> None:
        """Add answers; they are on disk when this returns."""
        with naming_full_disk(self._parts), self._parts.open("ab") as part:
            part.write("".join(f"{json.dumps(answer)}\n" for answer in answers).encode())
            part.flush()
            os.fsync(part.fileno())

    def finish(self, questions: Sequence[Question], models: Sequence[str]) -> None:
        """Put the answers of all models beside one another, in the order of the questions, and remove the parts.

        With follow-ups each model has a list of values, one for each turn, in place of one.
        """
        answers, lines = self.read(), []
        for question in questions:
            line, turns = question.plain(), range(1 + len(question.follow_ups))
            for column in COLUMNS:
                values = {m: [answers[m, question.id, turn][column] for turn in turns] for m in models}
                line[column] = values if question.follow_ups else {m: value for m, (value,) in values.items()}
            lines.append(f"{json.dumps(line, ensure_ascii=False)}\n")
        write_text(self.path, "".join(lines))
        self._parts.unlink()

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the finished file."""
        with self.path.open("rb") as file:  # only "\n" ends a line: JSON leaves U+2028 and others as they are
            return list(map(json.loads, file))
