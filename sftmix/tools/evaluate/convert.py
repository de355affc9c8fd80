"""Raw public files of medical benchmarks -> the rows that the task files of this room read, as JSONL.

A row has `id`, `context` (text, empty without one), `question`, `options` (a list of texts) and `answer` (the place of
the right option, from 0). Two files are made: the questions that are measured, and `shots`, the solved questions that
are in front of them. No question is in both.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from sftmix.common.errors import DataError
from sftmix.common.files import decoded
from sftmix.tools.runs.shown import write_jsonl

BENCHMARKS = {"medqa_4options": 4, "medqa_5options": 5, "pubmedqa": 3, "medmcqa": 4}
"""The benchmarks of Table 2 of the paper, by the names of their task files -> options of each question."""
SHOTS = 20
"""Solved questions that are taken from the raw file itself if it holds nothing else to take them from."""


def convert_benchmark(name: str, raw: Path, to: Path, *, shots: Path | None = None, test: Path | None = None) -> str:
    """Write `to/NAME.jsonl` and `to/NAME.shots.jsonl`; return a sentence about them.

    name   one of BENCHMARKS
    shots  raw file of solved questions, as the training split; questions that are also measured are left out
    test   JSON file whose keys or entries are the ids of the measured questions; the others are the shots
    Without both the shots are the SHOTS questions whose text has the smallest hash. Questions that the file has twice
    are measured once. Raises DataError for files that cannot be read, and rows that are not of this format.
    """
    files = {}
    for path in filter(None, (raw, shots)):
        value = _json_of(path)
        files[path] = value if isinstance(value, dict) else dict(enumerate(value))
    # MedMCQA's `cop` begins at 1 in the authors' files, at 0 on the hub; -1 is a question without an answer.
    cops = [row["cop"] for rows in files.values() for row in rows.values() if isinstance(row, dict) and "cop" in row]
    first = int(0 not in cops)
    if cops and first and 4 not in cops:
        both = " and ".join(map(str, files))
        raise DataError(
            f"{both}: no row has 0 or 4 as its cop, and that begins at 0 in some files, at 1 in others; give more rows"
        )
    solved = _rows(name, raw, files[raw], first)
    measured = dict(solved)
    if shots is not None:
        solved = _rows(name, shots, files[shots], first)
    elif test is None:
        for key in sorted(solved)[:SHOTS]:
            del measured[key]
    else:
        ids = set(map(str, _json_of(test)))
        measured = {key: row for key, row in solved.items() if row["id"] in ids}
        if len(measured) < len(ids):
            raise DataError(f"{test}: of its {len(ids)} ids, {len(measured)} are of questions in {raw}")
    examples = [row for key, row in solved.items() if key not in measured]
    if not measured or not examples:
        raise DataError(f"{raw}: {len(measured)} questions are left to measure and {len(examples)} for the shots")
    for path, part in zip(rows_and_shots(name, to), (measured.values(), examples), strict=True):
        write_jsonl(path, part)
    return f"{len(measured):,} questions and {len(examples):,} solved examples of {name} in {to}"


def rows_and_shots(name: str, directory: Path) -> tuple[Path, Path]:
    """Return the files of a task in a directory: what is measured, and the shots."""
    return directory / f"{name}.jsonl", directory / f"{name}.shots.jsonl"


def _rows(name: str, path: Path, raw: dict[Any, Any], first: int) -> dict[str, dict[str, Any]]:
    """Check the rows of a file, and return them as this room's.

    first  the `cop` of an answer a of MedMCQA
    The key of a row is a hash of context, question and options, without regard to case and spaces.
    """
    rows = {}
    try:
        for key, one in raw.items():
            context = ""
            question = one.get("question", one.get("QUESTION"))
            if name == "pubmedqa":  # an abstract in parts
                options = ["yes", "no", "maybe"]
                answer, context = options.index(one["final_decision"]), " ".join(one["CONTEXTS"])
            elif "cop" in one:  # MedMCQA
                options, answer = [one[f"op{letter}"] for letter in "abcd"], int(one["cop"]) - first
            else:  # MedQA: options by letter, and the letter of the right one
                letters = sorted(one["options"])
                options, answer = [one["options"][letter] for letter in letters], letters.index(one["answer_idx"])
            if not question.strip() or len(options) != BENCHMARKS[name] or answer not in range(len(options)):
                raise ValueError(f"row {key}")
            text = " ".join([context, question, *options])
            number = str(one.get("id", one.get("realidx", key)))
            row = {"id": number, "context": context, "question": question, "options": options, "answer": answer}
            rows[hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()] = row
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"each row needs a question and {BENCHMARKS[name]} options, one of them as the answer"
        raise DataError(f"{path}: a row is not one of {name} ({error}): {what}") from error
    return rows


def _json_of(path: Path) -> Any:
    """Return the list or object of a JSON file, or the list of its lines: MedMCQA's authors call these .json."""
    try:
        text = decoded(path.read_bytes())
        try:
            value = json.loads(text)
        except json.JSONDecodeError:  # only "\n" ends a line: other ends of lines, as U+2028, may be in JSON
            value = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not isinstance(value, list | dict):
            raise ValueError("it holds neither a list nor an object")
        return value
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; a JSON or JSONL file in UTF-8 is needed") from error
