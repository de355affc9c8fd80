"""Raw public files of medical benchmarks -> the rows that the task files of this room read, as JSONL.

A row has `id`, `context` (text, empty without one), `question`, `options` (a list of texts) and `answer` (the place of
the right option, from 0). Two files come out: the questions that are measured, and `shots`, the solved questions that
stand before them. No question is in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError
from sftmix.common.files import write_text

BENCHMARKS = {"medqa_4options": 4, "medqa_5options": 5, "pubmedqa": 3, "medmcqa": 4}
"""The benchmarks of Table 2 of the paper, by the names of their task files -> options of each question."""
SHOTS = 20
"""Solved questions that are taken from the raw file itself where it holds nothing else to take them from."""

Row = dict[str, Any]
File = str | Path


def convert(name: str, raw: File, to: Path, *, shots: File | None = None, test: File | None = None) -> str:
    """Write `to/NAME.jsonl` and `to/NAME.shots.jsonl`; return a sentence about them.

    name   one of BENCHMARKS
    shots  raw file of solved questions, as the training split; those that are measured, too, are left out
    test   JSON file whose keys or entries are the ids of the measured questions; the others are the shots
    Without both the shots are the SHOTS questions whose text has the smallest hash. Questions that the file has twice
    are measured once. Raises DataError for files that cannot be read, and rows that are not of this format.
    """
    rows = _rows(name, raw)
    measured = solved = rows
    if shots is not None:
        solved = _rows(name, shots)
    elif test is None:
        measured = {key: rows[key] for key in rows if key in sorted(rows)[SHOTS:]}
    else:
        ids = set(map(str, _json_of(test)))
        measured = {key: row for key, row in rows.items() if row["id"] in ids}
        if len(measured) < len(ids):
            raise DataError(f"{test}: of its {len(ids)} ids, {len(measured)} are of questions in {raw}")
    kept = [row for key, row in solved.items() if key not in measured]
    if not measured or not kept:
        raise DataError(f"{raw}: {len(measured)} questions are left to measure and {len(kept)} for the shots")
    for path, part in zip(files_of(name, to), (measured.values(), kept), strict=True):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return f"{len(measured):,} questions and {len(kept):,} solved examples of {name} in {to}"


def files_of(name: str, directory: Path) -> tuple[Path, Path]:
    """Return the files of a task in a directory: what is measured, and the shots."""
    return directory / f"{name}.jsonl", directory / f"{name}.shots.jsonl"


def _rows(name: str, path: File) -> dict[str, Row]:
    """Read a raw file (JSONL, a JSON list, or an object of rows by id) and check each row.

    The key of a row is a hash of context, question and options, without regard to case and spaces.
    """
    raw, rows, n = _json_of(path), dict[str, Row](), BENCHMARKS[name]
    try:
        pairs = list(raw.items() if isinstance(raw, dict) else enumerate(raw))
        # MedMCQA's `cop` begins at 1 in the authors' files, at 0 on the hub; all rows tell which it is.
        places = {int(row["cop"]) for _, row in pairs if "cop" in row}
        if places and (0 in places) == (4 in places):
            raise DataError(f"{path}: cop is {sorted(places)}: no answers (-1), or no telling where it counts from")
        for key, one in pairs:
            row = _row(name, str(key), one, 0 if 0 in places else 1)
            texts = [row["question"].strip(), *(text.strip() for text in row["options"])]
            if not all(texts) or len(row["options"]) != n or not 0 <= row["answer"] < n:
                raise ValueError(f"row {key}")
            text = " ".join([row["context"], row["question"], *row["options"]])
            rows[hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()] = row
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"each row needs a question and {n} options, none of them empty, and one of them as the answer"
        raise DataError(f"{path}: a row is not one of {name} ({error}): {what}") from error
    return rows


def _row(name: str, key: str, raw: Mapping[str, Any], first: int) -> Row:
    """Make a row of a raw one; KeyError and others for one of another format.

    key    its id where it has none of its own
    first  the number of the first option in `cop`
    """
    context, question = "", raw.get("question", raw.get("QUESTION"))
    if name == "pubmedqa":  # an abstract in parts
        options = ["yes", "no", "maybe"]
        answer, context = options.index(raw["final_decision"]), " ".join(raw["CONTEXTS"])
    elif "cop" in raw:  # MedMCQA
        options, answer = [raw[f"op{letter}"] for letter in "abcd"], int(raw["cop"]) - first
    else:  # MedQA: options by letter, and the letter of the right one
        letters = sorted(raw["options"])
        options, answer = [raw["options"][letter] for letter in letters], letters.index(raw["answer_idx"])
    own = str(raw.get("id", raw.get("realidx", key)))
    return {"id": own, "context": context, "question": question, "options": options, "answer": answer}


def _json_of(path: File) -> Any:
    """Return the value of a JSON file, or the list of the values of its lines: MedMCQA's authors call these .json."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except json.JSONDecodeError:  # only "\n" ends a line: other ends of lines, as U+2028, may stand in JSON
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; a JSON or JSONL file in UTF-8 is needed") from error
