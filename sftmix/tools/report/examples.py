"""One table of all examples of a run, report/examples.parquet, for pandas, DuckDB or a viewer of embeddings."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
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
    own = {*train.columns, *(() if held_out is None else held_out.columns)}
    shown = {name: _free(name, {*blocks[0], "label"}, own) for name in own}
    blocks[0] |= _own_columns(train, shown)
    if held_out is not None:
        blocks.append({**_held_out(view, held_out), **_own_columns(held_out, shown)})
    names = list(dict.fromkeys(name for block in blocks for name in block))
    sizes = [len(train), 0 if held_out is None else len(held_out)]
    columns = {}
    for name in names:
        values = [block.get(name, [None] * size) for block, size in zip(blocks, sizes, strict=False)]
        columns[name] = _column([value for part in values for value in part])
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
    ids = rows["id"].to_pylist()
    kept = {name: zip(ids, rows[name].to_pylist(), strict=True) for name in LOSSES if then.get(name) == now.get(name)}
    return {name: {i: loss for i, loss in pairs if loss is not None} for name, pairs in kept.items()}


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
        columns["group"] = list(view.groups)
    if dynamics is not None:
        columns["correctness"] = _numbers(correctness(view))
        for step, values in zip(dynamics.steps, perplexity(dynamics).T, strict=True):
            columns[f"perplexity_step_{step}"] = _numbers(values)
    for name, stage in LOSSES.items():
        sample = view.path / stage / SAMPLE
        losses = {**(_sample(sample) if sample.exists() else {}), **known.get(name, {})}
        columns[name] = [losses.get(i) for i in data.ids]
    for axis, name in enumerate(("x", "y")):
        columns[name] = [float(places[row][axis]) if row in places else None for row in range(len(data))]
    return columns


def _held_out(view: RunView, data: EncodedDataset) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {**_texts(data, list(data.examples())), "held_out": [True] * len(data)}
    for name, stage in LOSSES.items():
        path = view.path / stage / "eval.parquet"
        losses = {}
        if path.exists():
            ids, scores, _ = read_eval(path)
            losses = dict(zip(ids, (scores.nll_sum / scores.n_tokens).tolist(), strict=True))
        columns[name] = [losses.get(i) for i in data.ids]
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


def _free(name: str, taken: Container[str], own: Container[str]) -> str:
    """Return a name for a column of the user's; one whose name is taken gets `row_` before it, until it is free."""
    shown = name
    while shown in taken or (shown != name and shown in own):
        shown = f"row_{shown}"
    return shown


def _own_columns(data: EncodedDataset, shown: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return the label and the user's columns, under the names that are shown."""
    found = {} if data.labels is None else {"label": list(data.labels)}
    return found | {shown[name]: list(values) for name, values in data.columns.items()}


def correctness(view: RunView) -> Float64:
    """Return f64[N], the share of response tokens that were the argmax, over the checkpoints; NaN where not counted."""
    dynamics = view.dynamics
    assert dynamics is not None
    counted = dynamics.scored & (dynamics.n_correct != NOT_COUNTED).all(axis=1)
    share = dynamics.n_correct.mean(axis=1) / np.maximum(dynamics.n_tokens, 1)
    return np.where(counted, share, np.nan)


def _sample(path: Path) -> dict[str, float]:
    found = read_dynamics(path)
    return dict(zip(found.ids, (found.nll_sum[:, -1] / found.n_tokens).tolist(), strict=True))


def _numbers(values: Float64) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _column(values: list[Any]) -> pa.Array:
    """Return a column; values of several types, as users' fields may have, become text."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values])
