"""Answers on disk while they are made: killed at any moment, they are continued, and end the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import naming_full_disk, read_json, replacing, write_json
from sftmix.pipeline.directory import differences
from sftmix.tools.answers.questions import Question

Key = tuple[str, int]
"""The id of a question, and the turn from 0."""
Answer = dict[str, Any]
"""id, turn, and the columns below: the text (None if the prompt leaves no room in the model's context), how it ended
(stop, length, prompt_too_long), and numbers of tokens."""
COLUMNS = ("answers", "finish", "prompt_tokens", "answer_tokens")


class AnswerFile:
    """One JSONL file with the answers of all models, a line for each question.

    Beside it lies `FILE.inputs.json`, what it is made from, and while it is made `FILE.parts`: a JSONL file for each
    model, in the order in which its answers came.
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

    def read(self, model: str) -> dict[Key, Answer]:
        """Return the answers of a model so far, and drop a last line that was cut short."""
        file = self._part(model)
        if not file.exists():
            return {}
        whole, newline, _ = file.read_bytes().rpartition(b"\n")
        with replacing(file) as again:
            again.write(whole + newline)
        answers = map(json.loads, whole.splitlines())
        return {(answer["id"], answer["turn"]): answer for answer in answers}

    def append(self, model: str, answers: Sequence[Answer]) -> None:
        """Add answers; they are on disk when this returns."""
        file = self._part(model)
        with naming_full_disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as part:
                part.write("".join(f"{json.dumps(answer)}\n" for answer in answers).encode())
                part.flush()
                os.fsync(part.fileno())

    def finish(self, questions: Sequence[Question], models: Sequence[str]) -> None:
        """Put the answers of all models beside one another, in the order of the questions, and remove the parts.

        With follow-ups each model has a list of values, one for each turn, in place of one.
        """
        answers = {model: self.read(model) for model in models}
        with replacing(self.path) as file:
            for question in questions:
                line, turns = question.plain(), range(1 + len(question.follow_ups))
                for column in COLUMNS:
                    values = {m: [answers[m][question.id, turn][column] for turn in turns] for m in models}
                    line[column] = values if question.follow_ups else {m: value for m, (value,) in values.items()}
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        shutil.rmtree(self._parts)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the finished file."""
        with self.path.open("rb") as file:  # only "\n" ends a line: JSON leaves U+2028 and others as they are
            return list(map(json.loads, file))

    def _part(self, model: str) -> Path:
        return self._parts / f"{model.replace('/', '--')}.jsonl"
