"""Answers and accuracy of the finished runs of a table: the endpoints of preregistration-real.md that need no judge.

    python benchmarks/evidence/real/answers.py --table runs/real/main --data runs/real/data --name real-main

Each finished run answers prompts.json greedily, and MedMCQA if DATA/medmcqa.yaml is there (it is made by
`python docs/examples/medical_tasks.py medmcqa_2000.jsonl medmcqa --to DATA`). Both stay in the run, so the same
command goes on where it was. RESULTS/NAME/answers.json gets the figures of each run as it ends: the share of answers
that end their turn, the ratio of their words to the reference's (median), and the accuracy, also that of the base
model. Figures that are there and are not measured again stay.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.files import MANIFEST, read_json, write_json  # noqa: E402
from sftmix.tools.runs.read import read_json_if_there  # noqa: E402

LONGEST, QUESTIONS = 256, 200


def sftmix(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "sftmix", *map(str, words)], check=True)


def figures(run: Path, data: Path) -> dict[str, Any]:
    """Return the figures of a finished run, whose model answers where it has not yet."""
    answers = run / "answers.jsonl"
    sftmix("generate", run, "--prompts", data / "prompts.json", "--to", answers, "--max_new_tokens", LONGEST)
    rows = [json.loads(line) for line in answers.read_bytes().splitlines()]  # of bytes: text has more ends of lines
    found: dict[str, Any] = {"answers": len(rows), **form(rows)}
    return found | accuracy(run, data, "target")


def accuracy(run: Path, data: Path, model: str) -> dict[str, float]:
    """Return the accuracy of the target or of the base model of a run; nothing without the questions."""
    if not (data / "medmcqa.yaml").exists():
        return {}
    words = ("--models", model, "--limit", QUESTIONS)
    sftmix("evaluate", run, "--tasks", "medmcqa", "--include_path", data, *words)
    (file,) = (run / "evaluation").glob(f"medmcqa.{model}.*.json")
    return {"medmcqa": read_json(file)["scores"]["medmcqa"]["value"]}


def form(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of answers that end their turn, and how long they are beside the reference's words."""
    ended = [row["finish"]["target"] == "stop" for row in rows]
    ratios = [len((row["answers"]["target"] or "").split()) / max(1, len(row["reference"].split())) for row in rows]
    return {"ended": statistics.mean(ended), "words_to_reference": statistics.median(ratios)}


def keep(file: Path, name: str, found: dict[str, Any]) -> None:
    """Add the figures of a model to those that a file has."""
    kept = read_json_if_there(file)
    write_json(file, kept | {name: kept.get(name, {}) | found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="directory of a table that compare wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder of prompts.json")
    parser.add_argument("--name", required=True, help="folder of the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all results")
    options = parser.parse_args()
    runs = sorted(path.parent.parent for path in options.table.glob(f"*/seed-*/train/{MANIFEST}"))
    if not runs:
        sys.exit(f"error: no finished run in {options.table}")
    file = options.out / options.name / "answers.json"
    keep(file, "base", accuracy(runs[0], options.data, "base"))
    for run in runs:
        keep(file, f"{run.parent.name}-{run.name}", figures(run, options.data))
    print(f"{len(runs)} runs in {file}")


if __name__ == "__main__":
    main()
