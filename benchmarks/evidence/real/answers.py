"""Answers and accuracy of the finished runs of a table: the endpoints of preregistration-real.md that need no judge.

    python benchmarks/evidence/real/answers.py --table runs/real/main --data runs/real/data --name real-main

Each finished run answers prompts.json greedily, and MedMCQA if DATA/medmcqa.yaml is there (it is made by
`python docs/examples/medical_tasks.py medmcqa_2000.jsonl medmcqa --to DATA`). Both stay in the run, so the same
command goes on where it was. Each run of RESULTS/NAME.parquet, where collect.py has put it before, gets its figures as
soon as they are measured: the share of answers that end their turn, the ratio of their words to the reference's
(median), and the accuracy, also that of the base model. Figures that are there and are not measured again stay.
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

from benchmarks.evidence.study import Run, read_study, write_study  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.files import MANIFEST, read_json  # noqa: E402

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


def keep(file: Path, run: Run | None, found: dict[str, Any]) -> None:
    """Add the figures to those of a collected run, or of the base model if `run` is None."""
    study = read_study(file)
    kept = study.about.setdefault("base", {}) if run is None else study.runs[run]
    kept |= found
    write_study(file, study)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="directory of a table that compare wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder of prompts.json")
    parser.add_argument("--name", required=True, help="name of the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all results")
    options = parser.parse_args()
    places = sorted(path.parent.parent for path in options.table.glob(f"*/seed-*/train/{MANIFEST}"))
    if not places:
        sys.exit(f"error: no finished run in {options.table}")
    runs = {(place.parent.name, int(place.name.removeprefix("seed-"))): place for place in places}
    file = options.out / f"{options.name}.parquet"
    if missing := sorted(runs.keys() - read_study(file).runs.keys()):
        sys.exit(f"error: {file} has no run {missing[0]}: benchmarks/evidence/collect.py must keep the table first")
    keep(file, None, accuracy(places[0], options.data, "base"))
    for run, place in runs.items():
        keep(file, run, figures(place, options.data))
    print(f"{len(runs)} runs in {file}")


if __name__ == "__main__":
    main()
