"""Formats of answers: each reads the questions of a tool and writes the files that the tool takes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sftmix.common.errors import ConfigError
from sftmix.common.fields import listed
from sftmix.common.files import replacing
from sftmix.common.rng import stable_hash
from sftmix.common.shown import quoted
from sftmix.data.formats import checked_id, checked_text
from sftmix.data.jsonrows import BadRow
from sftmix.tools.answers.questions import Question, good_rows, no_row, read_questions, refused


@dataclass(frozen=True)
class Answered:
    """The answers of one model, in the order of the questions.

    name   the model, as --models names it
    label  its name for the tool: of a run with the run's name before it
    turns  the texts of each question's answers; "" where the prompt is too long
    """

    name: str
    label: str
    turns: Sequence[Sequence[str]]


class AnswerFormat(ABC):
    """A format of questions and answers."""

    models: ClassVar[int | None] = None
    """How many models it needs; None: one or more."""

    @abstractmethod
    def questions(self, names: list[str], columns: Mapping[str, str] | None) -> list[Question]:
        """Read the questions of these files; raise DataError that names a bad row.

        columns  data.columns of the run, for rows in the format of training data
        """

    @abstractmethod
    def answers_file(self, to: Path, labels: Sequence[str]) -> Path:
        """Return the file with the answers of the models with these labels, for the option --to."""

    @abstractmethod
    def files(self, to: Path, labels: Sequence[str]) -> list[Path]:
        """Return the other files that `write` writes."""

    @abstractmethod
    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        """Write the files of `files` and return them."""


class Rows(AnswerFormat):
    """Our own lines, from rows of any format of training data; --to is the file itself."""

    def questions(self, names: list[str], columns: Mapping[str, str] | None) -> list[Question]:
        return read_questions(names, columns)

    def answers_file(self, to: Path, labels: Sequence[str]) -> Path:
        return to

    def files(self, to: Path, labels: Sequence[str]) -> list[Path]:
        return []

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        return []


class ToolFormat(AnswerFormat):
    """The format of a tool with questions of its own; one file for each model lies in the directory --to."""

    file: ClassVar[str]
    """The file of a model, with {model} for its name."""

    def questions(self, names: list[str], columns: Mapping[str, str] | None) -> list[Question]:
        found = dict[str, Question]()
        for place, row in good_rows(names):
            question = self._question(place, row)
            if question.id in found:
                what = f"the id {quoted(question.id)} is taken by an earlier row; give each question an id of its own"
                raise refused(place, BadRow(what))
            found[question.id] = question
        if not found:
            raise no_row(names)
        return list(found.values())

    def answers_file(self, to: Path, labels: Sequence[str]) -> Path:
        # Named by the models: other runs lie in the same directory of the tool.
        return to / f"answers-{'+'.join(labels)}.jsonl"

    def files(self, to: Path, labels: Sequence[str]) -> list[Path]:
        return [to / self.file.format(model=label) for label in labels]

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        written = self.files(to, [model.label for model in models])
        for path, model in zip(written, models, strict=True):
            lines = [self.line(q, turns, model.label) for q, turns in zip(questions, model.turns, strict=True)]
            with replacing(path) as file:
                file.write(self.text(lines).encode())
        return written

    def text(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """Return the file's text: JSONL."""
        return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)

    @abstractmethod
    def question(self, row: Mapping[str, Any]) -> Question:
        """Make a question of a row; raise KeyError for a key that is missing, BadRow for a value of another kind."""

    @abstractmethod
    def line(self, question: Question, turns: Sequence[str], label: str) -> dict[str, Any]:
        """Return what the file of the model `label` says of a question, whose answers are `turns`."""

    def _question(self, place: str, row: dict[str, Any]) -> Question:
        try:
            return self.question(row)
        except KeyError as error:
            name, there = type(self).__name__, listed(row)
            raise refused(place, BadRow(f"not a question of {name}: it has no {error}; there are {there}")) from error
        except BadRow as error:
            raise refused(place, BadRow(f"not a question of {type(self).__name__}: {error}")) from error


class AlpacaEval(ToolFormat):
    """A JSON list of {instruction, output, generator, dataset}, for `alpaca_eval --model_outputs`."""

    file = "{model}.json"

    def question(self, row: Mapping[str, Any]) -> Question:
        instruction = _asked(row["instruction"], "instruction")
        dataset = checked_text(row.get("dataset", ""), "dataset")
        reference = None if row.get("output") is None else checked_text(row["output"], "output")
        name = f"{stable_hash(instruction, dataset):032x}"
        return Question(name, _user(instruction), reference, extra={"dataset": dataset})

    def text(self, lines: Sequence[Mapping[str, Any]]) -> str:
        return json.dumps(lines, indent=1, ensure_ascii=False) + "\n"

    def line(self, question: Question, turns: Sequence[str], label: str) -> dict[str, Any]:
        return {
            "instruction": question.messages[-1]["content"],
            "output": turns[0],
            "generator": label,
            "dataset": question.extra["dataset"],
        }


class IFEval(ToolFormat):
    """JSONL of {prompt, response}, what instruction_following_eval calls --input_response_data."""

    file = "{model}.jsonl"

    def question(self, row: Mapping[str, Any]) -> Question:
        return Question(checked_id(row["key"], "key"), _user(_asked(row["prompt"], "prompt")))

    def line(self, question: Question, turns: Sequence[str], label: str) -> dict[str, Any]:
        return {"prompt": question.messages[-1]["content"], "response": turns[0]}


class MTBench(ToolFormat):
    """FastChat's model answers: two turns, at a temperature that the category decides."""

    file = "model_answer/{model}.jsonl"
    TEMPERATURE: ClassVar[dict[str, float]] = {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }
    """FastChat's table (llm_judge/common.py); other categories get 0.7 there."""

    def question(self, row: Mapping[str, Any]) -> Question:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"turns is {quoted(turns)}; expected a list of texts")
        first, *later = (_asked(turn, f"turns[{place}]") for place, turn in enumerate(turns))
        name = checked_id(row["question_id"], "question_id")
        temperature = self.TEMPERATURE.get(checked_text(row["category"], "category"), 0.7)
        return Question(name, _user(first), None, tuple(later), temperature, {"question_id": row["question_id"]})

    def line(self, question: Question, turns: Sequence[str], label: str) -> dict[str, Any]:
        return {
            "question_id": question.extra["question_id"],
            "answer_id": f"{stable_hash(label, question.id, *turns):032x}",
            "model_id": label,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": 0.0,  # a clock would make another file of the same answers
        }


class ArenaHard(ToolFormat):
    """Arena-Hard's model answers, in the form of its version 2."""

    file = "model_answer/{model}.jsonl"

    def question(self, row: Mapping[str, Any]) -> Question:
        return Question(checked_id(row["uid"], "uid"), _user(_asked(row["prompt"], "prompt")))

    def line(self, question: Question, turns: Sequence[str], label: str) -> dict[str, Any]:
        return {
            "uid": question.id,
            "ans_id": f"{stable_hash(label, question.id, *turns):032x}",
            "model": label,
            "messages": [*question.messages, {"role": "assistant", "content": {"answer": turns[0]}}],
            "tstamp": 0.0,
            "metadata": {},
        }


def _asked(value: Any, what: str) -> str:
    """Return the text of a question; raise BadRow for another value, and for a text without a word."""
    if not checked_text(value, what).strip():
        raise BadRow(f"{what} is empty")
    return str(value)


def _user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def check_models(form: AnswerFormat, names: Sequence[str]) -> None:
    """Raise ConfigError if a format needs another number of models."""
    if form.models is not None and len(names) != form.models:
        raise ConfigError(
            f"--models names {len(names)} ({', '.join(names)}); this format compares {form.models}: --models "
            "target,baseline"
        )
