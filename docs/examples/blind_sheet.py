"""Answers of two models to the 80 Vicuna prompts of AlpacaEval, for people to compare blindly, as in appendix B.2.

    python blind_sheet.py runs/first --models target,baseline --references gpt4_1106_preview.json --to sheet.csv
    python blind_sheet.py --count sheet.csv

The first command asks both models (`sftmix generate`, greedy, at most 2,048 tokens), and writes sheet.csv and
sheet.key.json: on which side each model's answer is, drawn for each prompt. People fill the column `better` with left,
right or tie. The second command prints the wins of each model.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from collections import Counter
from math import comb
from pathlib import Path

COLUMNS = ("id", "prompt", "left", "right", "better")


def make_sheet(lines: list[dict], models: list[str], sheet: Path) -> None:
    """Write the sheet and its key from lines of `sftmix generate`."""
    key, rows = {}, []
    for line in lines:
        sides = random.Random(line["id"]).sample(models, 2)  # the same sheet each time
        key[line["id"]] = sides
        answers = [line["answers"][model] or "" for model in sides]
        rows.append(dict(zip(COLUMNS, [line["id"], line["messages"][-1]["content"], *answers, ""], strict=True)))
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    sheet.with_suffix(".key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")


def count(sheet: Path) -> tuple[Counter[str], float]:
    """Return how often each model won, or neither, and the two-sided p of the exact sign test of the wins alone."""
    key = json.loads(sheet.with_suffix(".key.json").read_text(encoding="utf-8"))
    with sheet.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wins: Counter[str] = Counter(dict.fromkeys(sorted(next(iter(key.values()))), 0))
    for row in rows:
        verdict = row["better"].strip().lower()
        if verdict not in ("left", "right", "tie"):
            sys.exit(f"error: {row['id']}: better is {row['better']!r}; write left, right or tie")
        wins[verdict if verdict == "tie" else key[row["id"]][verdict == "right"]] += 1
    first, second = [wins[model] for model in sorted(next(iter(key.values())))]
    n = first + second
    tail = sum(comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    return wins, min(1.0, 2 * tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run directory, or a model")
    parser.add_argument("--models", default="target,baseline", help="the two, as `sftmix generate` takes them")
    parser.add_argument("--references", type=Path, help="AlpacaEval's file of reference outputs, which has the prompts")
    parser.add_argument("--subset", default="vicuna", help="of the prompts, by the field `dataset`")
    parser.add_argument("--to", type=Path, default=Path("sheet.csv"))
    parser.add_argument("--count", type=Path, metavar="SHEET", help="count a sheet that people have filled")
    options = parser.parse_args()
    if options.count:
        wins, p = count(options.count)
        print(", ".join(f"{name} {n}" for name, n in wins.items()), f"(sign test: p = {p:.3f})")
        return
    if not (options.run and options.references):
        parser.error("name a run and --references, or --count SHEET")
    if options.to.exists():  # people may have filled it
        parser.error(f"{options.to} exists; name another file")
    rows = json.loads(options.references.read_text(encoding="utf-8"))
    asked = [{"prompt": row["instruction"]} for row in rows if row["dataset"] == options.subset]
    prompts, answers = (options.to.with_suffix(f".{name}") for name in ("prompts.json", "answers.jsonl"))
    prompts.write_text(json.dumps(asked, ensure_ascii=False) + "\n", encoding="utf-8")
    words = ["--prompts", prompts, "--to", answers, "--models", options.models, "--max_new_tokens", "2048"]
    subprocess.run([sys.executable, "-m", "sftmix", "generate", options.run, *map(str, words)], check=True)
    lines = [json.loads(line) for line in answers.read_bytes().splitlines()]
    make_sheet(lines, options.models.split(","), options.to)
    print(f"{len(lines)} pairs in {options.to}; the key is {options.to.with_suffix('.key.json')}")


if __name__ == "__main__":
    main()
