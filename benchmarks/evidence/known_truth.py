"""Read the tables of known truth: does confidence find corrupted rows, and does Mixup keep them from being learnt?

    python benchmarks/evidence/known_truth.py --tables runs/evidence/known-truth

It writes corrupted-SHARE.json for each table, with the figures of each run, and contrasts.json with the planned tests,
as docs/decisions/known-truth.md says. A table that is not finished is left out of the tests. The loss of each training
row under a trained model is that of `sftmix report RUN --score`, which is made where it is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.findings import holm_of_planned  # noqa: E402
from benchmarks.evidence.known_rows import SHARES  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.common.files import read_json, write_json  # noqa: E402
from sftmix.common.tables import read_confidence, read_eval  # noqa: E402
from sftmix.compare.statistics import interval_seeds, mean_sd, sign_flip  # noqa: E402
from sftmix.report.examples import scored_before  # noqa: E402

Rows = Mapping[str, Mapping[str, str]]
"""Id -> a row, with its family and its truth: clean, corrupted or open."""

ARMS, SEEDS = ("NTP", "SFTMix", "RandomSplit"), range(1, 11)
CONTRASTS = (("SFTMix", "NTP"), ("SFTMix", "RandomSplit"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder of data/ and of the tables corrupted-SHARE")
    parser.add_argument("--out", type=Path, default=RESULTS / "known-truth", help="folder of the results")
    options = parser.parse_args()
    found = {}
    for share in SHARES:
        table = options.tables / f"corrupted-{share}"
        if (table / "table.json").exists():
            found[share] = figures_of(table, options.tables / "data", share)
            write_json(options.out / f"{table.name}.json", found[share])
    complete = {share: each for share, each in found.items() if each["complete"]}
    write_json(options.out / "contrasts.json", contrasts(complete))
    print(f"{len(found)} tables, {len(complete)} of them finished, in {options.out}")


# ---------------------------------------------------------------------------------------- figures of runs


def figures_of(table: Path, data: Path, share: int) -> dict[str, Any]:
    """Return the figures of a table's finished runs, by variant and seed, and the AUC of each seed's confidence."""
    train, held_out = rows_of(data / f"train-{share}.jsonl"), rows_of(data / "eval.jsonl")
    runs: dict[str, dict[str, Any]] = {}
    found_by: dict[str, Any] = {}
    for manifest in sorted(table.glob("*/seed-*/train/MANIFEST.json")):
        run = manifest.parent.parent
        seed = run.name.removeprefix("seed-")
        runs.setdefault(run.parent.name, {})[seed] = figures_of_run(run, train, held_out)
        if run.parent.name == "SFTMix":
            ids, confidence, _ = read_confidence(run / "confidence" / "confidence.parquet")
            found_by[seed] = aucs(dict(zip(ids, confidence.tolist(), strict=True)), train)
    complete = all(set(map(str, SEEDS)) <= set(runs.get(arm, ())) for arm in ARMS)
    return {"share": share, "complete": complete, "auc": found_by, "runs": runs}


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def figures_of_run(run: Path, train: Rows, held_out: Rows) -> dict[str, Any]:
    """Return held-out figures, exact match by family, and the NLL per token of training rows by their truth.

    gap  how much higher that of the corrupted rows is than that of the clean ones
    """
    summary = read_json(run / "summary.json")
    ids, scores, _ = read_eval(run / "train" / "eval.parquet")
    exact = dict(zip(ids, (scores.n_correct == scores.n_tokens).tolist(), strict=True))
    nll = by_truth(training_losses(run, train), train)
    return {
        "eval_nll_after": summary["eval_nll_after"],
        "eval_nll_best": summary["eval_nll_best"],
        "exact": {kind: _share(exact, held_out, "kind", kind) for kind in ("deterministic", "open")},
        "exact_by_family": {name: _share(exact, held_out, "family", name) for name in _values(held_out, "family")},
        "train_nll": nll,
        "gap": nll["corrupted"] - nll["clean"] if "corrupted" in nll else None,
    }


def _values(rows: Rows, key: str) -> list[str]:
    return sorted({row[key] for row in rows.values()})


def _share(exact: Mapping[str, bool], rows: Rows, key: str, value: str) -> float:
    return float(np.mean([exact[i] for i, row in rows.items() if row[key] == value]))


def training_losses(run: Path, train: Rows) -> dict[str, tuple[float, int]]:
    """Return id -> (nats per response token, response tokens) of all training rows under the trained model."""
    import pyarrow.parquet as pq

    from sftmix.report.write import write_report

    file = run / "report" / "examples.parquet"
    if not set(train) <= set(scored_before(run).get("loss_after", {})):
        write_report([run], map_size=0, score_all=True)
    table = pq.read_table(file, columns=["id", "loss_after", "response_tokens"], filters=[("held_out", "==", False)])
    columns = (table[name].to_pylist() for name in ("id", "loss_after", "response_tokens"))
    return {i: (loss, tokens) for i, loss, tokens in zip(*columns, strict=True)}


def by_truth(losses: Mapping[str, tuple[float, int]], train: Rows) -> dict[str, float]:
    """Return truth -> nats per response token, over all tokens of its rows."""
    found = {}
    for truth in _values(train, "truth"):
        own = [losses[i] for i, row in train.items() if row["truth"] == truth]
        found[truth] = sum(loss * tokens for loss, tokens in own) / sum(tokens for _, tokens in own)
    return found


def aucs(confidence: Mapping[str, float], train: Rows) -> dict[str, float]:
    """Return how well a low confidence finds the corrupted rows; {} without any.

    deterministic    among the rows of deterministic tasks
    within_families  the mean over families of that within each
    all              among all rows, the open ones included
    """
    known = {i: row for i, row in train.items() if not np.isnan(confidence[i])}
    if not any(row["truth"] == "corrupted" for row in known.values()):
        return {}
    of_rules = {i: row for i, row in known.items() if row["truth"] != "open"}
    families = [{i: r for i, r in of_rules.items() if r["family"] == name} for name in _values(of_rules, "family")]
    parts = [auc(confidence, family) for family in families]
    return {
        "deterministic": auc(confidence, of_rules),
        "within_families": float(np.mean(parts)),
        "all": auc(confidence, known),
    }


def auc(confidence: Mapping[str, float], rows: Rows) -> float:
    """Return the share of pairs (corrupted row, other row) in which the corrupted one is less confident; ties half."""
    from scipy.stats import mannwhitneyu

    wrong = [confidence[i] for i, row in rows.items() if row["truth"] == "corrupted"]
    right = [confidence[i] for i, row in rows.items() if row["truth"] != "corrupted"]
    return float(mannwhitneyu(right, wrong).statistic) / (len(wrong) * len(right))


# ------------------------------------------------------------------------------------------------- tests


def contrasts(tables: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the AUCs with their intervals, and the planned tests of each contrast with Holm over the shares."""
    dirty = {share: table for share, table in tables.items() if share}
    found: dict[str, Any] = {"auc": {}, "gap": {}, "exact": {}}
    for share, table in dirty.items():
        names = ("deterministic", "within_families", "all")
        found["auc"][str(share)] = {name: _of([each[name] for each in table["auc"].values()]) for name in names}
    for ours, theirs in CONTRASTS:
        name = f"{ours} - {theirs}"
        found["gap"][name] = dict(_tested(dirty, ours, theirs, ("gap",), planned=len(SHARES) - 1))
        found["exact"][name] = dict(_tested(tables, ours, theirs, ("exact", "deterministic"), planned=len(SHARES)))
    return found


def _tested(
    tables: Mapping[int, Mapping[str, Any]], ours: str, theirs: str, keys: Sequence[str], *, planned: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield share -> paired differences at it, with the exact sign-flip test and Holm over the planned shares."""
    found = {}
    for share, table in tables.items():
        a, b = (table["runs"][variant] for variant in (ours, theirs))
        differences = [_figure(a[seed], keys) - _figure(b[seed], keys) for seed in a if seed in b]
        found[str(share)] = {**_of(differences), "differences": differences, "p": sign_flip(differences)}
    p_values = [each["p"] for each in found.values()]
    for (name, each), p in zip(found.items(), holm_of_planned(p_values, planned), strict=True):
        yield name, {**each, "p_holm": p}


def _figure(run: Mapping[str, Any], keys: Sequence[str]) -> float:
    value: Any = run
    for key in keys:
        value = value[key]
    return float(value)


def _of(values: Sequence[float]) -> dict[str, Any]:
    mean, sd = mean_sd(values)
    return {"mean": mean, "sd": sd, "interval": interval_seeds(values)}


if __name__ == "__main__":
    main()
