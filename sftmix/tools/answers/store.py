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


class AnswerFile:
    """One JSONL file with the answers of all models, a line for each question.

    Beside it lies `FILE.inputs.json`, what it is made from, and while it is made `FILE.parts`: a JSONL file for each
    model, in the order in which its answers came.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inputs = path.with_name(f"{path.name}.inputs.json")
        self._parts = path.with_name(f"{path.name}.parts")

    @property
    def done(self) -> bool:
        """True if all answers are in the file."""
        return self.path.exists()

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Take the file for answers made from `inputs`; raise ConfigError if it was made, or begun, from others."""
        if self._inputs.exists():
            if different := differences(read_json(self._inputs), json.loads(json.dumps(inputs))):
                raise ConfigError(
                    f"{self.path} was made with other inputs: {'; '.join(different[:8])}. Use another --to, or the old "
                    "settings"
                )
        elif self.path.exists():
            raise ConfigError(f"{self.path} exists, and generate did not write it; use another --to")
        else:
            write_json(self._inputs, inputs)

    def read(self, model: str) -> dict[str, dict[str, Any]]:
        """Return id -> answers of a model so far, and drop a last line that was cut short."""
        file = self._part(model)
        if not file.exists():
            return {}
        whole, newline, torn = file.read_bytes().rpartition(b"\n")
        if torn:
            with replacing(file) as again:
                again.write(whole + newline)
        lines = (json.loads(line) for line in whole.splitlines())
        return {line["id"]: line for line in lines}

    def append(self, model: str, batch: Sequence[Mapping[str, Any]]) -> None:
        """Add the answers of a batch; they are on disk when this returns."""
        file = self._part(model)
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in batch)
        with naming_full_disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as part:
                part.write(text.encode())
                part.flush()
                os.fsync(part.fileno())

    def finish(self, questions: Sequence[Question], models: Sequence[str]) -> None:
        """Put the answers of all models beside one another, in the order of the questions, and remove the parts."""
        answers = {model: self.read(model) for model in models}
        with replacing(self.path) as file:
            for question in questions:
                turns = {model: answers[model][question.id]["turns"] for model in models}
                file.write(f"{json.dumps(_line(question, turns), ensure_ascii=False)}\n".encode())
        shutil.rmtree(self._parts)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the finished file."""
        # splitlines would also split at U+2028 and others, which JSON leaves as they are within a text.
        return list(map(json.loads, self.path.read_text(encoding="utf-8").rstrip("\n").split("\n")))

    def _part(self, model: str) -> Path:
        return self._parts / f"{model.replace('/', '--')}.jsonl"


_COLUMNS = {"answers": "text", "finish": "finish", "prompt_tokens": "prompt_tokens", "answer_tokens": "answer_tokens"}


def _line(question: Question, turns: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the line of a question; with follow-ups each model has a list in place of one value."""

    def of(answers: list[dict[str, Any]], field: str) -> Any:
        values = [answer[field] for answer in answers]
        return values if question.follow_ups else values[0]

    columns = {name: {m: of(found, field) for m, found in turns.items()} for name, field in _COLUMNS.items()}
    return {**question.plain(), **columns}
