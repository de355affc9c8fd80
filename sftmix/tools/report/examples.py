"""One table of all examples of a run, report/examples.parquet, for pandas, DuckDB or a viewer of embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftmix.common.files import MANIFEST, replacing, sha256_file
from sftmix.common.tables import read_dynamics, read_eval
from sftmix.components.confidence import perplexity
from sftmix.data import EncodedDataset
from sftmix.measure.model import SAMPLE
from sftmix.tools.report.run import RunView, text_of
from sftmix.types import NOT_COUNTED, Example, Float64

if TYPE_CHECKING:
    import pyarrow as pa

FILE = Path("report") / "examples.parquet"

LOSSES = {"loss_before": "base", "loss_after": "train", "loss_after_baseline": "baseline"}
"""Columns of the mean NLL per response token (nats), and the stage that measured it."""
_MODELS = b"sftmix.models"
"""Key in the file's metadata: of which models the losses are."""


def examples_table(
    view: RunView, *, known: Mapping[str, Mapping[str, float]], places: Mapping[int, Sequence[float]]
) -> pa.Table:
    """Return one line per example, training examples first, then the held-out ones.

    known   column of LOSSES -> id -> nats, for training examples that were scored for the report; the others have those
            of the sample that every run measures, or null
    places  row -> (x, y) on the map of hidden states
    """
    import pyarrow as pa

    train, held_out = view.rows.data.train, view.rows.data.eval
    blocks = [_training(view, known, places)]
    taken = {*blocks[0], "label"}
    if held_out is not None:
        blocks.append(_texts(held_out, list(held_out.examples())) | {"held_out": [True] * len(held_out)})
        for name, stage in LOSSES.items():
            losses = _losses(view.path / stage / "eval.parquet")
            blocks[1][name] = [losses.get(i) for i in held_out.ids]
    sides = [side for side in (train, held_out) if side is not None]
    names = dict.fromkeys(name for side in sides for name in side.columns)
    for block, side in zip(blocks, sides, strict=True):
        if side.labels is not None:
            block["label"] = list(side.labels)
        block |= {_free(name, taken, names): list(values) for name, values in side.columns.items()}
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for block in blocks for name in block):
        parts = [block.get(name, [None] * len(side)) for block, side in zip(blocks, sides, strict=True)]
        columns[name] = _column([value for part in parts for value in part])
    return pa.table(columns, metadata={_MODELS: json.dumps(_models(view.path))})


def scored_before(run: Path) -> dict[str, dict[str, float]]:
    """Return the losses of training examples in an earlier table of the run: a new report keeps them.

    Those of a model that has been trained anew since are left out.
    """
    import pyarrow.parquet as pq

    if not (run / FILE).exists():
        return {}
    with open(run / FILE, "rb") as file:
        rows = pq.read_table(file, columns=["id", *LOSSES], filters=[("held_out", "==", False)])
    then, now = json.loads((rows.schema.metadata or {}).get(_MODELS, "{}")), _models(run)
    kept: dict[str, dict[str, float]] = {}
    for name in LOSSES:
        if then.get(name) == now.get(name):
            losses = zip(rows["id"].to_pylist(), rows[name].to_pylist(), strict=True)
            kept[name] = {i: loss for i, loss in losses if loss is not None}
    return kept


def _models(run: Path) -> dict[str, str]:
    """Return column of LOSSES -> hash of the manifest of the stage that made its model, where there is one."""
    files = {name: run / stage / MANIFEST for name, stage in LOSSES.items()}
    return {name: sha256_file(file) for name, file in files.items() if file.exists()}


def write_examples(path: Path, table: pa.Table) -> None:
    """Write the table as Parquet, beside its place and then moved there."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(table, file)


def _training(
    view: RunView, known: Mapping[str, Mapping[str, float]], places: Mapping[int, Sequence[float]]
) -> dict[str, list[Any]]:
    scores, data, dynamics = view.scores, view.rows.data.train, view.dynamics
    columns: dict[str, list[Any]] = {
        **_texts(data, view.examples),
        "held_out": [False] * len(data),
        "truncated": data.truncated.tolist(),
        "confidence": _numbers(scores.confidence),
        "variability": _numbers(scores.variability),
    }
    if view.groups:
        columns["group"] = view.groups
    if dynamics is not None:
        columns["correctness"] = _numbers(correctness(view))
        for step, values in zip(dynamics.steps, perplexity(dynamics).T, strict=True):
            columns[f"perplexity_step_{step}"] = _numbers(values)
    for name, stage in LOSSES.items():
        losses = {**_losses(view.path / stage / SAMPLE), **known.get(name, {})}
        columns[name] = [losses.get(i) for i in data.ids]
    for axis, name in enumerate(("x", "y")):
        columns[name] = [float(places[row][axis]) if row in places else None for row in range(len(data))]
    return columns


def _texts(data: EncodedDataset, examples: Sequence[Example]) -> dict[str, list[Any]]:
    texts = [text_of(example) for example in examples]
    return {
        "id": list(data.ids),
        "source": [example.source for example in examples],
        "instruction": [instruction for instruction, _ in texts],
        "response": [response for _, response in texts],
        "response_tokens": data.n_targets.tolist(),
    }


def _free(name: str, taken: set[str], names: Mapping[str, None]) -> str:
    """Return a name for a column of the user's; one whose name is taken gets `row_` before it, until it is free."""
    free = name
    while free in taken or (free != name and free in names):
        free = f"row_{free}"
    return free


def _losses(path: Path) -> dict[str, float]:
    """Return id -> mean NLL per response token of a table of scores, eval.parquet or the sample; {} without it."""
    if not path.exists():
        return {}
    if path.name == SAMPLE:
        sample = read_dynamics(path)
        ids, nll = sample.ids, sample.nll_sum[:, -1] / sample.n_tokens
    else:
        ids, scores, _ = read_eval(path)
        nll = scores.nll_sum / scores.n_tokens
    return dict(zip(ids, nll.tolist(), strict=True))


def correctness(view: RunView) -> Float64:
    """Return f64[N], the share of response tokens that were the argmax, over the checkpoints; NaN where not counted."""
    dynamics = view.dynamics
    assert dynamics is not None
    counted = dynamics.scored & (dynamics.n_correct != NOT_COUNTED).all(axis=1)
    share = dynamics.n_correct.mean(axis=1) / np.maximum(dynamics.n_tokens, 1)
    return np.where(counted, share, np.nan)


def _numbers(values: Float64) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _column(values: list[Any]) -> pa.Array:
    """Return a column; values of several types, as users' fields may have, become text."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values])
