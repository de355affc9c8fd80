"""Cut Alpaca rows for the study at 135M and 270M (preregistration-real.md): the first rows of prepare.py's three parts.

    python benchmarks/evidence/real/rows.py --rows ../shared/data/alpaca/alpaca_8k.json --out runs/real/data

An instruction is on one side of each cut. prompts.json is the beginning of held_out.json: its prompts are answered.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.prepare import Row, digest, parts_of  # noqa: E402

SIZES = {"train": 320, "pilot": 100, "held_out": 160}
PROMPTS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON file with instruction, input and output")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole = parts_of(json.loads(options.rows.read_text(encoding="utf-8")))
    parts: dict[str, list[Row]] = {name: whole[name][:size] for name, size in SIZES.items()}
    parts["prompts"] = parts["held_out"][:PROMPTS]
    for name, part in parts.items():
        text = json.dumps(part, ensure_ascii=False, indent=0) + "\n"
        (options.out / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}.json: {len(part):,} rows, sha256 {digest(text)}")


if __name__ == "__main__":
    main()
