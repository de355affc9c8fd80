"""Draw the rows of preregistration-regularises.md: each seed's own, and those that all seeds share.

    python benchmarks/evidence/regularises/rows.py --rows ../shared/data/alpaca --out runs/regularises/data

The rows are those of alpaca_17k.jsonl whose instruction no study of ours has seen: it is in none of the other files of
that folder, and not among the first 400 rows, which benchmarks/small/table7-alpagasus.yaml takes. They are ordered by a
hash of their instruction (prepare.py), and each instruction is there once, so that it is on one side of every cut. The
parts of SIZES are cut off one after the other; prompts.json is the beginning of held_out.json, to be answered.
rows.json, beside this file, lists the rows by the beginnings of their hashes; nothing is written if the draw differs.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.prepare import Row, digest, ordered, plain  # noqa: E402

SEEDS, PILOT_SEEDS = range(1, 17), (901, 902)
SIZES = {"held_out": 320, "watch": 80, "pilot": 160} | {f"train-{seed}": 80 for seed in (*SEEDS, *PILOT_SEEDS)}
"""Name of a file -> its rows."""
PROMPTS = 32
LIST = Path(__file__).with_name("rows.json")
TWIN = 400


def lines(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def parts_of(folder: Path) -> dict[str, list[Row]]:
    """Return name -> rows, from the folder of the four Alpaca files."""
    whole = lines(folder / "alpaca_17k.jsonl")
    seen = whole[:TWIN]
    for name in ("alpaca_8k.json", "alpaca_gpt4_1k.json", "gpt4_vs_davinci_pairs.jsonl"):
        seen = [*seen, *lines(folder / name)]
    taken = {plain(row["instruction"]) for row in seen}
    free = dict[str, Row]()
    for row in ordered(whole):
        if plain(row["instruction"]) not in taken:
            free.setdefault(plain(row["instruction"]), {key: row[key] for key in ("instruction", "input", "output")})
    rest = iter(free.values())
    parts = {name: list(islice(rest, size)) for name, size in SIZES.items()}
    return parts | {"prompts": parts["held_out"][:PROMPTS]}


def text_of(part: list[Row]) -> str:
    return json.dumps(part, ensure_ascii=False, indent=0) + "\n"


def listed(parts: dict[str, list[Row]]) -> dict[str, list[str]]:
    """Return name -> the first 16 hexadecimal digits of each row's SHA-256."""
    return {name: [digest(json.dumps(row, ensure_ascii=False))[:16] for row in part] for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="folder of the Alpaca files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files of rows")
    options = parser.parse_args()
    parts = parts_of(options.rows)
    if not LIST.exists():
        LIST.write_text(json.dumps(listed(parts)).replace("], ", "],\n") + "\n", encoding="utf-8")
    if json.loads(LIST.read_text(encoding="utf-8")) != listed(parts):
        sys.exit(f"error: {options.rows} gives other rows than {LIST.name}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (options.out / f"{name}.json").write_text(text_of(part), encoding="utf-8")
        print(f"{name}.json: {len(part)} rows, sha256 {digest(text_of(part))}")


if __name__ == "__main__":
    main()
