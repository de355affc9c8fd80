"""The medical benchmarks of Table 2 of the paper as tasks for `sftmix evaluate`, from their raw public files.

    python medical_tasks.py medqa_test.jsonl medqa_4options --shots medqa_train.jsonl --to benchmarks
    python medical_tasks.py ori_pqal.json pubmedqa --test test_ground_truth.json --to benchmarks
    sftmix evaluate runs/first --tasks medqa_4options,pubmedqa --include_path benchmarks

Each task is asked as Labrak et al. 2024 (arXiv 2402.10373) ask it: three solved questions, then the question; the
answer is the letter that the model gives the most probability after "**Answer:**(". Three files are written: the task
file of lm-eval, the questions that are measured, and the solved ones. A row has `id`, `context` (text, empty without
one), `question`, `options` (a list of texts) and `answer` (the place of the right option, from 0).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

BENCHMARKS = {"medqa_4options": 4, "medqa_5options": 5, "pubmedqa": 3, "medmcqa": 4}
"""Name of a task -> options of each question."""
SHOTS = 20
"""Solved questions that are taken from the raw file itself if it holds nothing else to take them from."""
ASKED = (
    "{% if context %}{{context}} \n {% endif %}**Question:** {{question}} \n "
    "{% for option in options %}({{'ABCDE'[loop.index0]}}) {{option}} \n {% endfor %}**Answer:**("
)


def convert(name: str, raw: Path, to: Path, shots: Path | None = None, test: Path | None = None) -> str:
    """Write the files of a task into a directory; return a sentence about them.

    shots  raw file of solved questions, as the training split; questions that are also measured are left out
    test   JSON file whose keys or entries are the ids of the measured questions; the others are the shots
    Without both the shots are the SHOTS questions whose text has the smallest hash. Questions that the file has twice
    are measured once. Exits for files that cannot be read, and rows that are not of this format.
    """
    files = {}
    for path in filter(None, (raw, shots)):
        value = json_of(path)
        files[path] = value if isinstance(value, dict) else dict(enumerate(value))
    # MedMCQA's `cop` begins at 1 in the authors' files, at 0 on the hub; -1 is a question without an answer.
    cops = [row["cop"] for rows in files.values() for row in rows.values() if isinstance(row, dict) and "cop" in row]
    first = int(0 not in cops)
    if cops and first and 4 not in cops:
        sys.exit(
            f"error: {' and '.join(map(str, files))}: no row has 0 or 4 as its cop, and that begins at 0 in some "
            "files, at 1 in others; give more rows"
        )
    solved = rows_of(name, raw, files[raw], first)
    measured = dict(solved)
    if shots is not None:
        solved = rows_of(name, shots, files[shots], first)
    elif test is None:
        for key in sorted(solved)[:SHOTS]:
            del measured[key]
    else:
        ids = set(map(str, json_of(test)))
        measured = {key: row for key, row in solved.items() if row["id"] in ids}
        if len(measured) < len(ids):
            sys.exit(f"error: {test}: of its {len(ids)} ids, {len(measured)} are of questions in {raw}")
    examples = [row for key, row in solved.items() if key not in measured]
    if not measured or not examples:
        sys.exit(f"error: {raw}: {len(measured)} questions are left to measure and {len(examples)} for the shots")
    to.mkdir(parents=True, exist_ok=True)
    parts = {"test": to.absolute() / f"{name}.jsonl", "shots": to.absolute() / f"{name}.shots.jsonl"}
    for path, rows in zip(parts.values(), (measured.values(), examples), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    (to / f"{name}.yaml").write_text(yaml.safe_dump(task_file(name, parts)), encoding="utf-8")
    return f"{len(measured):,} questions and {len(examples):,} solved examples of {name} in {to}"


def task_file(name: str, parts: dict[str, Path]) -> dict[str, Any]:
    """Return the task as lm-eval reads it; parts: the files of its two splits."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in parts.items()}},
        "test_split": "test",
        "fewshot_split": "shots",
        "num_fewshot": 3,
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about medical knowledge. \n ",
        "doc_to_text": ASKED,
        "doc_to_choice": list("ABCDE"[: BENCHMARKS[name]]),
        "doc_to_target": "answer",
        "target_delimiter": "",
        "fewshot_delimiter": " \n ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def rows_of(name: str, path: Path, raw: dict[Any, Any], first: int) -> dict[str, dict[str, Any]]:
    """Check the rows of a file, and return them as those of a task.

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
        sys.exit(f"error: {path}: a row is not one of {name} ({error}): {what}")
    return rows


def json_of(path: Path) -> Any:
    """Return the list or object of a JSON file, or the list of its lines: MedMCQA's authors call these .json."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:  # only "\n" ends a line: other ends of lines, as U+2028, may be in JSON
            value = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not isinstance(value, list | dict):
            raise ValueError("it holds neither a list nor an object")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path}: {error}; a JSON or JSONL file in UTF-8 is needed")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="raw file of the benchmark")
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory of the task and its rows")
    solved = parser.add_mutually_exclusive_group()
    solved.add_argument("--shots", type=Path, metavar="FILE", help="raw file of solved questions for the prompts")
    solved.add_argument("--test", type=Path, metavar="FILE", help="JSON file with the ids that are measured")
    options = parser.parse_args()
    print(convert(options.name, options.raw, options.to, options.shots, options.test))


if __name__ == "__main__":
    main()
