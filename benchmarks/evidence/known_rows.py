"""Make the rows of known truth: the quickstart's, with some of the responses corrupted, and its model.

    python benchmarks/evidence/known_rows.py --out runs/evidence/known-truth/data

It writes model/, eval.jsonl and train-0.jsonl to train-40.jsonl. Only responses to deterministic tasks are corrupted:
those to open tasks are drawn at random, so that there is no truth to take away. A corrupted row has the response of
another row of its family that differs from its own: it is wrong, and no longer or shorter than a right one. What is
corrupted at a smaller share is so, in the same way, at a larger one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sftmix.ranks.rng import generator  # noqa: E402
from sftmix.tools.quickstart import N_EVAL as HELD_OUT  # noqa: E402
from sftmix.tools.quickstart import (  # noqa: E402
    N_TRAIN,
    Row,
    make_rows,
    materialise,
    write_jsonl,
)

SHARES = (0, 10, 20, 40)
"""Percent of the responses to deterministic tasks that are corrupted."""
SEED = 2026


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the rows")
    options = parser.parse_args()
    made = materialise(options.out, seed=SEED)
    rows = make_rows(n=N_TRAIN + HELD_OUT, seed=SEED)
    train, held_out = named(rows[:N_TRAIN], "train"), named(rows[N_TRAIN:], "held-out")
    made.train.unlink()  # train-0.jsonl has the same rows with ids
    write_jsonl(made.eval, held_out)
    for share in SHARES:
        found = corrupted(train, share, seed=SEED)
        write_jsonl(options.out / f"train-{share}.jsonl", found)
        print(f"train-{share}.jsonl: {len(found):,} rows, {sum(r['truth'] == 'corrupted' for r in found)} corrupted")


def named(rows: Sequence[Row], side: str) -> list[Row]:
    """Return the rows with an id and `truth`: clean for deterministic tasks, open for the others."""
    truth = {"deterministic": "clean", "open": "open"}
    return [row | {"id": f"{side}-{k:04}", "truth": truth[row["kind"]]} for k, row in enumerate(rows)]


def corrupted(rows: Sequence[Row], share: int, *, seed: int) -> list[Row]:
    """Return the rows with this share (percent) of the clean ones of each family corrupted; their `truth` says so."""
    found = list(rows)
    for family in dict.fromkeys(row["family"] for row in rows if row["truth"] == "clean"):
        own = [k for k, row in enumerate(rows) if row["family"] == family]
        order = generator(seed, "corrupted_rows", family).permutation(len(own))
        for place in order[: round(len(own) * share / 100)].tolist():
            k = own[place]
            others = [rows[other]["output"] for other in own if rows[other]["output"] != rows[k]["output"]]
            drawn = generator(seed, "corrupted_response", rows[k]["id"]).integers(len(others))
            found[k] = rows[k] | {"output": others[drawn], "truth": "corrupted"}
    return found


if __name__ == "__main__":
    main()
