"""A small benchmark: its rows, and the prompts of its questions as a person would write them."""

import json
import runpy
from pathlib import Path

import yaml

from sftmix.disk.files import write_json
from sftmix.model.load import fingerprint
from sftmix.tools.evaluate.table import write_tables

MEDICAL = runpy.run_path(str(Path(__file__).resolve().parents[3] / "docs" / "examples" / "medical_tasks.py"))
"""The example that makes tasks."""
BENCHMARKS = MEDICAL["BENCHMARKS"]
HEAD = "The following are multiple choice questions (with answers) about medical knowledge. \n "
WORDS = ("red", "two", "the", "sort", "list")


def question(name: str, number: int) -> dict:
    """A row of a task; its right answer goes round."""
    context = f"Text {number}." if name == "pubmedqa" else ""
    options = [f"{word} {number}" for word in WORDS[: BENCHMARKS[name]]]
    row = {"id": str(number), "context": context, "question": f"Is it {number}?", "options": options}
    return {**row, "answer": number % len(options)}


def asked(row: dict, answer: str = "") -> str:
    """The question as Labrak et al. write it, up to its answer."""
    context = f"{row['context']} \n " if row["context"] else ""
    options = " \n ".join(f"({letter}) {text}" for letter, text in zip("ABCDE", row["options"], strict=False))
    return f"{context}**Question:** {row['question']} \n {options} \n **Answer:**({answer}"


def write_rows(directory: Path, name: str, questions: int, shots: int = 3) -> list[dict]:
    """Write a task with its rows as the example does, and return the measured rows."""
    rows = [question(name, number) for number in range(questions + shots)]
    directory.mkdir(parents=True, exist_ok=True)
    files = {"test": directory / f"{name}.jsonl", "shots": directory / f"{name}.shots.jsonl"}
    for file, part in zip(files.values(), (rows[:questions], rows[questions:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(MEDICAL["task_file"](name, files)))
    return rows[:questions]


def write_result(run: Path, task: str, values: list[float], model: str = "target") -> None:
    """Write what `evaluate` keeps of a task on a model of a run, and the table."""
    score = {"metric": "acc", "value": sum(values) / len(values), "stderr": None, "n": len(values), "shots": 0}
    entry = {
        "task": task,
        "model": model,
        "identity": "",
        "weights": fingerprint(str(run / "train" / "model")) if model == "target" else "",
        "settings": {"num_fewshot": None, "limit": None, "seed": 1, "chat_template": False, "dtype": "auto"},
        "scores": {task: {**score, "questions": list("abcdef"[: len(values)]), "values": values}},
        "finished": 1.0,
    }
    write_json(run / "evaluation" / f"{len(task)}.{model}.000000000000.json", entry)
    write_tables(run / "evaluation", {})
