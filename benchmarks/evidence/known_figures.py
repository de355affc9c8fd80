"""The figures of a run on rows whose truth is known, and of the confidence of its reference."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.disk.files import read_json
from sftmix.disk.tables import read_columns

Rows = Mapping[str, Mapping[str, str]]
"""Id -> a row, with its family and its truth: clean, corrupted or open."""


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def figures_of_run(run: Path, train: Rows, held_out: Rows) -> dict[str, Any]:
    """Return held-out figures, exact match by family, and the NLL per token of training rows by their truth.

    gap  how much higher that of the corrupted rows is than that of the clean ones
    """
    summary = read_json(run / "summary.json")
    table = read_columns(run / "train" / "eval.parquet", "id", "n_tokens", "n_correct")
    exact = dict(zip(table["id"], (table["n_correct"] == table["n_tokens"]).tolist(), strict=True))
    nll = by_truth(training_losses(run), train)
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


def training_losses(run: Path) -> dict[str, tuple[float, int]]:
    """Return id -> (nats per response token, response tokens) of all training rows under the trained model."""
    import pyarrow.parquet as pq

    from sftmix.tools.report.write import write_report

    file, train = run / "report" / "examples.parquet", [("held_out", "==", False)]
    if not file.exists() or pq.read_table(file, columns=["loss_after"], filters=train)["loss_after"].null_count:
        write_report(run, map_size=0, score_all=True)
    table = pq.read_table(file, columns=["id", "loss_after", "response_tokens"], filters=train)
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
