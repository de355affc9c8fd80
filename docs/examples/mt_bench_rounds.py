"""FastChat's judge in several rounds, each with files of its own: the mean score, and its spread over the rounds.

    python mt_bench_rounds.py data/mt_bench first-target --rounds 5

data/mt_bench holds question.jsonl, model_answer/ and reference_answer/, and its parent judge_prompts.jsonl. Run it with
the Python that has FastChat. A round that is finished is read back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

JUDGED = Path("data/mt_bench/model_judgment/gpt-4_single.jsonl")


def judged(bench: Path, model: str, folder: Path) -> float:
    """Judge once in a folder of its own, and return the mean score of both turns."""
    finished = folder / "done"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a round that was cut short FastChat would keep a half
        here = folder / "data" / "mt_bench"
        for part in ("model_answer", "reference_answer"):
            shutil.copytree(bench / part, here / part)
        shutil.copy(bench / "question.jsonl", here)
        shutil.copy(bench.parent / "judge_prompts.jsonl", folder / "data")
        words = ["--model-list", model, "--judge-file", "data/judge_prompts.jsonl", "--parallel", "4"]
        command = [sys.executable, "-m", "fastchat.llm_judge.gen_judgment", *words]
        subprocess.run(command, cwd=folder, input="\n", text=True, stdout=subprocess.DEVNULL, check=True)
        finished.touch()
    rows = [json.loads(line) for line in (folder / JUDGED).read_text(encoding="utf-8").splitlines()]
    scores = [row["score"] for row in rows if row["model"] == model]
    failed = scores.count(-1)  # FastChat's mark of a judgement without a rating
    print(f"{folder.name}: {len(scores)} judgements, {failed} without a rating")
    return statistics.mean(score for score in scores if score != -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", type=Path, default=Path("rounds"))
    given = parser.parse_args()
    means = [judged(given.bench, given.model, given.to / f"round-{n}") for n in range(1, given.rounds + 1)]
    spread = statistics.stdev(means) if len(means) > 1 else float("nan")
    print(f"{given.model}: {statistics.mean(means):.3f} +- {spread:.3f} (mean and standard deviation of {len(means)})")


if __name__ == "__main__":
    main()
