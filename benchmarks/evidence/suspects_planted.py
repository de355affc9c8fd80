"""One kind of error at a time, in rows that the signals were not chosen on: the order that is shown beside each signal.

    python benchmarks/evidence/suspects_planted.py rows --out DIR/planted.jsonl
    sftmix confidence --model.path MODEL --data.train DIR/planted.jsonl --reference FromCheckpoints \\
        --reference.paths '[MODEL]' --reference.token_nll true --reference.response_alone true \\
        --training.precision bf16 --out DIR/planted
    python benchmarks/evidence/suspects_planted.py table --rows DIR/planted.jsonl --run DIR/planted

`alpaca` has 400 rows of alpaca_17k.jsonl that alpaca_8k.json lacks, `medquad` 200. A tenth is wrong in one way, or in
five ways in turns ("mixed"). The table has the area under the ROC curve and the hits among the first tenth.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence import suspects  # noqa: E402
from benchmarks.evidence.suspects_rows import FOREIGN, REFUSALS, SHARED, cut, swapped, words  # noqa: E402
from sftmix.disk.tables import read_dynamics  # noqa: E402
from sftmix.tools.quickstart import Row, write_jsonl  # noqa: E402
from sftmix.types import TrainingDynamics  # noqa: E402

SIZES = {"alpaca": 400, "medquad": 200}
FIELDS = ("instruction", "input", "output")


def pools() -> dict[str, list[Row]]:
    """Return the real rows of each set, of at most 700 characters."""
    known = {
        row["instruction"] + "|" + row["input"] for row in json.loads((SHARED / "alpaca/alpaca_8k.json").read_text())
    }
    files = {"alpaca": SHARED / "alpaca/alpaca_17k.jsonl", "medquad": SHARED / "medical/medquad_4k.jsonl"}
    every = {name: [{f: row.get(f, "") for f in FIELDS} for row in suspects.read_lines(files[name])] for name in files}
    every["alpaca"] = [row for row in every["alpaca"] if row["instruction"] + "|" + row["input"] not in known]
    return {
        name: [
            row
            for row in rows
            if row["output"].strip() and len(row["output"]) < 700 and len(row["instruction"] + row["input"]) < 1500
        ]
        for name, rows in every.items()
    }


def refused(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    return [REFUSALS[rng.integers(4)] for _ in chosen]


def misformed(rows: list[Row], chosen: list[int], rng: np.random.Generator) -> list[str]:
    """Return sentences in another language and the prompts, in turns."""
    return [
        f"{rows[k]['instruction']} {rows[k]['input']}".strip()
        if place % 2
        else " ".join(FOREIGN[j] for j in rng.permutation(6)[: rng.integers(1, 3)])
        for place, k in enumerate(chosen)
    ]


KINDS: dict[str, Callable[[list[Row], list[int], np.random.Generator], list[str]]] = {
    "swapped": swapped,
    "cut": cut,
    "refusal": refused,
    "words": words,
    "form": misformed,
}


def make_rows() -> list[Row]:
    """Return each row as it is and in the ways in which it is made wrong, with ids SET/KIND/NUMBER."""
    made = []
    for name, pool in pools().items():
        seed = len({"alpaca": "alpaca17k"}.get(name, name))
        rng, later = (np.random.default_rng([first, seed]) for first in (71, 72))
        rows = [pool[k] for k in rng.permutation(len(pool))[: SIZES[name]]]
        long = [k for k in range(len(rows)) if len(rows[k]["output"].split()) >= 8]
        chosen = rng.permutation(long)[: len(rows) // 10].tolist()
        made += [{"id": f"{name}/clean/{k:03}", **row} for k, row in enumerate(rows)]
        for kind, corrupt in KINDS.items():
            outputs = corrupt(rows, chosen, later if kind in ("words", "form") else rng)
            made += [
                {"id": f"{name}/{kind}/{k:03}", **rows[k], "output": output}
                for k, output in zip(chosen, outputs, strict=True)
            ]
    return made


def lines_of(rows: list[Row], dynamics: TrainingDynamics) -> list[str]:
    """Return lines of Markdown: of each order and signal, for each set and kind, area and hits."""
    by_id, cells, heads = {row["id"]: row for row in rows}, dict[str, list[str]](), list[str]()
    vectors = suspects.sentence_vectors({"all": rows})
    for name, size in SIZES.items():
        chosen = [int(one.rsplit("/", 1)[1]) for one in by_id if one.startswith(f"{name}/swapped")]
        for kind in (*KINDS, "mixed"):
            turns = [*KINDS] if kind == "mixed" else [kind]
            wrong = {k: turns[place % len(turns)] for place, k in enumerate(chosen)}
            ids = [f"{name}/{wrong.get(k, 'clean')}/{k:03}" for k in range(size)]
            truth = np.array([k in wrong for k in range(size)])
            heads.append(f"{name}: {kind}" if kind == "swapped" else kind)
            for signal, scores in suspects.signals_of([by_id[one] for one in ids], dynamics.of(ids), vectors).items():
                known = np.where(np.isnan(scores), np.nanmin(scores) - 1, scores)
                first = np.argsort(-known, kind="stable")[: truth.sum()]
                cells.setdefault(signal, []).append(f"{roc_auc_score(truth, known):.3f}, {truth[first].sum()}")
    table = [f"| order | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return [*table, *(f"| {signal} | {' | '.join(of_signal)} |" for signal, of_signal in cells.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("rows").add_argument("--out", type=Path, required=True)
    table = commands.add_parser("table")
    for name in ("rows", "run"):
        table.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "rows":
        write_jsonl(given.out, make_rows())
    else:
        dynamics = read_dynamics(given.run / "confidence" / "dynamics.parquet")
        print("\n".join(lines_of(suspects.read_lines(given.rows), dynamics)))


if __name__ == "__main__":
    main()
