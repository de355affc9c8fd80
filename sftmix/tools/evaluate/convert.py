"""Raw public files of medical benchmarks -> the rows that the task files of this room read, as JSONL.

A row has `id`, `context` (text, empty without one), `question`, `options` (a list of texts) and `answer` (the place of
the right option, from 0). Two files come out: the questions that are measured, and `shots`, the solved questions that
stand before them. No question is in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import write_text
from sftmix.tools.evaluate.raw import Raw, json_of, raw_rows

LETTERS = "ABCDE"
SHOTS = 20
"""Solved questions that are taken from the raw file itself where it holds nothing else to take them from."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A raw format. options: how many each question has; read: raw rows -> rows, in their order."""

    options: int
    read: Callable[[Sequence[Raw]], list[Row]]


def convert(name: str, raw: Path, to: Path, *, shots: Path | None = None, test: Path | None = None) -> list[str]:
    """Write `to/NAME.jsonl` and `to/NAME.shots.jsonl`; return sentences about them.

    shots  raw file of solved questions, as the training split; those that are measured, too, are left out
    test   JSON file whose keys or entries are the ids of the measured questions; the others are the shots
    Without both the shots are the SHOTS questions whose text has the smallest hash. Questions that the file has twice
    are measured once. Raises ConfigError for an unknown name, DataError for rows that are not of this format.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"--convert is {name}; allowed: {', '.join(BENCHMARKS)}")
    if shots is not None and test is not None:
        raise ConfigError("--shots and --test exclude each other: each says which questions are solved examples")
    rows = _rows(name, raw)
    unique = list({_key(row): row for row in rows}.values())
    if shots is not None:
        measured, solved = unique, _rows(name, shots)
    elif test is not None:
        named = _named_by(rows, test)
        measured, solved = [r for r in unique if _key(r) in named], [r for r in unique if _key(r) not in named]
    else:
        first = set(sorted(map(_key, unique))[:SHOTS])
        measured, solved = [r for r in unique if _key(r) not in first], [r for r in unique if _key(r) in first]
    seen = {_key(row) for row in measured}
    kept = [row for row in solved if _key(row) not in seen]
    if not measured or not kept:
        raise DataError(f"{raw}: {len(measured)} questions are left to measure and {len(kept)} for the shots")
    for path, found in zip(files_of(name, to), (measured, kept), strict=True):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    told = [f"{len(measured):,} questions and {len(kept):,} solved examples of {name} in {to}"]
    told += [f"{len(rows) - len(unique):,} questions were there twice"] if len(rows) > len(unique) else []
    return told + ([f"{len(solved) - len(kept):,} solved ones are measured, too: left out"] if kept != solved else [])


def files_of(name: str, directory: Path) -> tuple[Path, Path]:
    """Return the files of a task in a directory: what is measured, and the shots."""
    return directory / f"{name}.jsonl", directory / f"{name}.shots.jsonl"


def _key(row: Row) -> str:
    """Return the hash of what is asked: context, question and options, without regard to case and spaces."""
    text = " ".join([row["context"], row["question"], *row["options"]])
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def _named_by(rows: list[Row], test: Path) -> set[str]:
    """Return the keys of the questions whose ids a file has; DataError names ids that no row has."""
    found = json_of(test)
    if not isinstance(found, dict | list):
        raise DataError(
            f"{test}: it is {str(found)[:40]!r}; a JSON list of ids, or an object with ids as keys, is needed"
        )
    ids = set(map(str, found))
    unknown = sorted(ids - {row["id"] for row in rows})
    if unknown:
        raise DataError(f"{test}: {len(unknown)} of {len(ids)} ids are of no question, first {unknown[0]!r}")
    return {_key(row) for row in rows if row["id"] in ids}


# ------------------------------------------------------------------------------------------- raw files


def _rows(name: str, path: Path) -> list[Row]:
    """Read a raw file and check each row."""
    benchmark = BENCHMARKS[name]
    raw = list(raw_rows(path))
    try:
        rows = benchmark.read(raw)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: its rows are not those of {name}: {error!r} is missing or no such value") from error
    for (place, _), row in zip(raw, rows, strict=True):
        if len(row["options"]) != benchmark.options or not 0 <= row["answer"] < benchmark.options:
            raise DataError(
                f"{place}: {len(row['options'])} options with answer {row['answer']}; {name} has {benchmark.options}"
            )
        if not all(isinstance(text, str) and text.strip() for text in (row["question"], *row["options"])):
            raise DataError(f"{place}: the question or an option is empty")
    return rows


def _row(number: int, raw: Mapping[str, Any], options: Sequence[str], answer: int, context: str = "") -> Row:
    question = raw.get("question", raw.get("QUESTION"))
    found = str(raw.get("id", raw.get("realidx", number)))
    return {"id": found, "context": context, "question": question, "options": list(options), "answer": answer}


def _lettered(raws: Sequence[Raw]) -> list[Row]:
    """Read rows with `options` by letter and the letter of the right one, `answer_idx`: MedQA."""
    return [
        _row(number, raw, [raw["options"][letter] for letter in sorted(raw["options"])], _place(raw["answer_idx"]))
        for number, (_, raw) in enumerate(raws)
    ]


def _place(letter: str) -> int:
    return LETTERS.find(letter.strip().upper()[:1] or "?")


def _medmcqa(raws: Sequence[Raw]) -> list[Row]:
    """Read MedMCQA: `opa` to `opd` with `cop`, or rows by letter. `cop` counts from 1 in the authors' files and from 0
    on the hub; which of the two is seen from all rows.
    """
    if not raws or "cop" not in raws[0][1]:
        return _lettered(raws)
    places = {int(raw["cop"]) for _, raw in raws}
    if -1 in places:
        raise DataError(f"{raws[0][0]}: cop is -1: this split is published without answers; take the validation split")
    if (0 in places) == (4 in places):
        raise DataError(f"{raws[0][0]}: cop is {sorted(places)}, so it cannot be told whether it counts from 0 or 1")
    first = 0 if 0 in places else 1
    return [
        _row(number, raw, [raw[f"op{letter}"] for letter in "abcd"], int(raw["cop"]) - first)
        for number, (_, raw) in enumerate(raws)
    ]


def _pubmedqa(raws: Sequence[Raw]) -> list[Row]:
    """Read PubMedQA: an abstract in parts, CONTEXTS, and final_decision; the options are yes, no and maybe."""
    answers = ["yes", "no", "maybe"]
    return [
        _row(number, raw, answers, answers.index(raw["final_decision"]), " ".join(raw["CONTEXTS"]))
        for number, (_, raw) in enumerate(raws)
    ]


BENCHMARKS: Mapping[str, Benchmark] = {
    "medqa_4options": Benchmark(4, _lettered),
    "medqa_5options": Benchmark(5, _lettered),
    "pubmedqa": Benchmark(3, _pubmedqa),
    "medmcqa": Benchmark(4, _medmcqa),
}
"""The benchmarks of Table 2 of the paper, by the names of their task files."""
