"""Cut a file of Alpaca rows into the training, pilot and held-out rows of the study, the same ones on any machine.

    python benchmarks/evidence/prepare.py --rows ../shared/data/alpaca/alpaca_8k.json --out runs/evidence/data

Rows without a response are dropped. The others are ordered by a hash of their instruction, letters and digits alone, so
rows with the same instruction stand together. The first 1,225 are held out, the next 400 are the pilot's held-out rows,
and the rest is for training. An instruction stays on one side of a cut: rows after a cut whose instruction stands
before it are dropped. Of rows with the same instruction and input the first is kept.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

HELD_OUT, PILOT = 1_225, 400

Row = Mapping[str, str]


def plain(text: str) -> str:
    """Lower-case letters and digits, each run of anything else as one space."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def digest(text: str) -> str:
    """SHA-256 of a text, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def ordered(rows: Iterable[Row]) -> list[Row]:
    """The rows with a response in the order of the study, each question once."""
    questions: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["output"].strip():
            questions.setdefault((plain(row["instruction"]), plain(row["input"])), row)
    ranked = sorted(questions, key=lambda question: (digest(question[0]), digest(question[1])))
    return [questions[question] for question in ranked]


def cut(rows: list[Row], size: int) -> tuple[list[Row], list[Row]]:
    """The first `size` rows, and those of the others whose instruction is not among the first."""
    first, others = rows[:size], rows[size:]
    taken = {plain(row["instruction"]) for row in first}
    return first, [row for row in others if plain(row["instruction"]) not in taken]


def parts_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Name of a file -> its rows."""
    held_out, others = cut(ordered(rows), HELD_OUT)
    pilot, train = cut(others, PILOT)
    return {"held_out": held_out, "pilot": pilot, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON file with instruction, input and output")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.json, pilot.json, held_out.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts_of(json.loads(options.rows.read_text(encoding="utf-8"))).items():
        text = json.dumps(part, ensure_ascii=False, indent=0) + "\n"
        (options.out / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}.json: {len(part):,} rows, sha256 {digest(text)}")


if __name__ == "__main__":
    main()
