"""Formats of answers: each reads the questions of a tool and writes the files that the tool takes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sftmix.answers.questions import Question, good_rows, read_questions, refused
from sftmix.common.errors import ConfigError
from sftmix.common.files import replacing
from sftmix.common.rng import stable_hash
from sftmix.data.jsonrows import BadRow


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
    """A format. Its files are written into the directory --to, beside answers.jsonl with the answers of all models."""

    about: ClassVar[str]
    models: ClassVar[int | None] = None
    """How many models it needs; None: one or more."""

    def questions(self, names: list[str], columns: Mapping[str, str] | None) -> list[Question]:
        """Read the questions of the tool's own file; raise DataError that names a bad row.

        columns  data.columns of the run, for rows of training data
        """
        return [self._question(place, row) for place, row in good_rows(names)]

    def answers_file(self, to: Path) -> Path:
        """Return the file with the answers of all models."""
        return to / "answers.jsonl"

    @abstractmethod
    def question(self, row: Mapping[str, Any]) -> Question:
        """Make a question of a row; raise KeyError or TypeError for a row of another kind."""

    @abstractmethod
    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        """Write the files for the tool and return them."""

    def _question(self, place: str, row: dict[str, Any]) -> Question:
        try:
            return self.question(row)
        except (KeyError, TypeError, IndexError) as error:
            name, what = type(self).__name__, f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise refused(place, BadRow(f"not a question of {name}: it {what}; there are {', '.join(row)}")) from error


class Rows(AnswerFormat):
    """Our own lines, from rows of any format; --to is the file itself."""

    about = (
        "one line for each prompt, with the answers of all models beside one another; prompts are rows of any format"
    )

    def questions(self, names: list[str], columns: Mapping[str, str] | None) -> list[Question]:
        return read_questions(names, columns)

    def answers_file(self, to: Path) -> Path:
        return to

    def question(self, row: Mapping[str, Any]) -> Question:
        raise NotImplementedError  # rows are read by the formats of training data

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        return []


class AlpacaEval(AnswerFormat):
    """A JSON list of {instruction, output, generator, dataset} for each model, for `alpaca_eval --model_outputs`."""

    about = "AlpacaEval: MODEL.json for each model; prompts are a file of model outputs, such as the reference's"

    def question(self, row: Mapping[str, Any]) -> Question:
        instruction = str(row["instruction"])
        name = f"{stable_hash(instruction, row.get('dataset', '')):032x}"
        extra = {"dataset": row.get("dataset", "")}
        return Question(name, _user(instruction), row.get("output"), extra=extra)

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        return [_write_json(to / f"{model.label}.json", self._rows(questions, model)) for model in models]

    def _rows(self, questions: Sequence[Question], model: Answered) -> list[dict[str, Any]]:
        return [
            {
                "instruction": _last_user(question),
                "output": turns[0],
                "generator": model.label,
                "dataset": (question.extra or {})["dataset"],
            }
            for question, turns in zip(questions, model.turns, strict=True)
        ]


class IFEval(AnswerFormat):
    """JSONL of {prompt, response} for each model, what instruction_following_eval calls --input_response_data."""

    about = "IFEval: MODEL.jsonl for each model; prompts are its input_data.jsonl"

    def question(self, row: Mapping[str, Any]) -> Question:
        return Question(str(row["key"]), _user(str(row["prompt"])))

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        return [
            write_lines(
                to / f"{model.label}.jsonl",
                [{"prompt": _last_user(q), "response": t[0]} for q, t in zip(questions, model.turns, strict=True)],
            )
            for model in models
        ]


class MTBench(AnswerFormat):
    """FastChat's model answers: two turns, at a temperature that the category decides."""

    about = "MT-Bench: model_answer/MODEL.jsonl as FastChat writes it; prompts are its question.jsonl"
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
        first, *later = row["turns"]
        temperature = self.TEMPERATURE.get(row["category"], 0.7)
        extra = {"question_id": row["question_id"]}
        return Question(str(row["question_id"]), _user(first), None, tuple(later), temperature, extra)

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        return [
            write_lines(
                to / "model_answer" / f"{model.label}.jsonl",
                [self._line(q, t, model.label) for q, t in zip(questions, model.turns, strict=True)],
            )
            for model in models
        ]

    def _line(self, question: Question, turns: Sequence[str], label: str) -> dict[str, Any]:
        return {
            "question_id": (question.extra or {})["question_id"],
            "answer_id": f"{stable_hash(label, question.id, *turns):032x}",
            "model_id": label,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": 0.0,  # a clock would make another file of the same answers
        }


class ArenaHard(AnswerFormat):
    """Arena-Hard's model answers, in the form of its version 2."""

    about = "Arena-Hard 2: model_answer/MODEL.jsonl; prompts are its question.jsonl"

    def question(self, row: Mapping[str, Any]) -> Question:
        return Question(str(row["uid"]), _user(str(row["prompt"])))

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        return [
            write_lines(
                to / "model_answer" / f"{model.label}.jsonl",
                [self._line(q, t[0], model.label) for q, t in zip(questions, model.turns, strict=True)],
            )
            for model in models
        ]

    def _line(self, question: Question, answer: str, label: str) -> dict[str, Any]:
        return {
            "uid": question.id,
            "ans_id": f"{stable_hash(label, question.id, answer):032x}",
            "model": label,
            "messages": [*question.messages, {"role": "assistant", "content": {"answer": answer}}],
            "tstamp": 0.0,
            "metadata": {},
        }


def _user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _last_user(question: Question) -> str:
    return question.messages[-1]["content"]


def _write_json(path: Path, value: object) -> Path:
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSONL atomically and return its path."""
    with replacing(path) as file:
        for row in rows:
            file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
    return path


def check_models(form: AnswerFormat, names: Sequence[str]) -> None:
    """Raise ConfigError if a format needs another number of models."""
    if form.models is not None and len(names) != form.models:
        raise ConfigError(
            f"--models names {len(names)} ({', '.join(names)}); this format compares {form.models}: --models "
            "target,baseline"
        )
