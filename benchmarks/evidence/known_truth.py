"""Read the tables of known truth: does confidence find corrupted rows, and does Mixup keep them from being learnt?

    python benchmarks/evidence/known_truth.py --tables runs/evidence/known-truth

It writes corrupted-SHARE.json for each table, with the figures of each run, and contrasts.json with the planned tests,
as known-truth.md says. A table that is not finished is left out of the tests. The loss of each training row under a
trained model is that of `sftmix report RUN --score`, which is made where it is not there.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.known_figures import aucs, figures_of_run, rows_of  # noqa: E402
from benchmarks.evidence.known_rows import SHARES  # noqa: E402
from benchmarks.evidence.known_tests import contrasts  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.files import MANIFEST, write_json  # noqa: E402
from sftmix.disk.tables import read_columns  # noqa: E402
from sftmix.tools.compare.plan import has_diverged  # noqa: E402

ARMS, SEEDS = ("NTP", "SFTMix", "RandomSplit"), range(1, 11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder of data/ and of the tables corrupted-SHARE")
    parser.add_argument("--out", type=Path, default=RESULTS / "known-truth", help="folder of the results")
    options = parser.parse_args()
    kept = keep(options.tables, options.out)
    finished = sum(each["complete"] for each in kept.values())
    print(f"{len(kept)} tables, {finished} of them finished, in {options.out}")


def keep(tables: Path, out: Path) -> dict[int, dict[str, Any]]:
    """Write the figures of all tables and the tests of the finished ones; return share -> the figures of its table."""
    kept: dict[int, dict[str, Any]] = {}
    for share in SHARES:
        if (table := tables / f"corrupted-{share}").exists():
            kept[share] = figures_of(table, tables / "data", share)
            write_json(out / f"corrupted-{share}.json", kept[share])
    write_json(out / "contrasts.json", contrasts({share: each for share, each in kept.items() if each["complete"]}))
    return kept


def figures_of(table: Path, data: Path, share: int) -> dict[str, Any]:
    """Return the figures of a table's runs that are over.

    auc       seed -> how well the confidence of its reference finds the corrupted rows
    runs      arm -> seed -> figures of a finished run
    diverged  arm -> seeds of its runs that diverged: they are over, and have no figures
    complete  True if every planned run is finished or has diverged
    """
    train, held_out = rows_of(data / f"train-{share}.jsonl"), rows_of(data / "eval.jsonl")
    runs: dict[str, dict[str, Any]] = {}
    diverged: dict[str, list[int]] = {}
    found_by: dict[str, Any] = {}
    for arm, seed in itertools.product(ARMS, SEEDS):
        run = table / arm / f"seed-{seed}"
        if has_diverged(run):
            diverged.setdefault(arm, []).append(seed)
        elif (run / "train" / MANIFEST).exists() and (run / "summary.json").exists():
            runs.setdefault(arm, {})[str(seed)] = figures_of_run(run, train, held_out)
        else:
            continue
        if arm == "SFTMix":  # the confidence is older than the training, which may have diverged
            scores = read_columns(run / "confidence" / "confidence.parquet", "id", "confidence")
            found_by[str(seed)] = aucs(dict(zip(scores["id"], scores["confidence"].tolist(), strict=True)), train)
    over = sum(map(len, [*runs.values(), *diverged.values()]))
    complete = over == len(ARMS) * len(SEEDS)
    return {"share": share, "complete": complete, "auc": found_by, "diverged": diverged, "runs": runs}


if __name__ == "__main__":
    main()
