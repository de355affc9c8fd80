"""One table of all examples of a run, report/examples.parquet, for pandas, DuckDB or a viewer of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


def examples_table(view: RunView, *, scored: Mapping[str, Float64], places: Mapping[int, Sequence[float]]) -> pa.Table:
    """Return one line per example, training examples first, then the held-out ones.

    scored  column of LOSSES -> f64[N] in nats, of all training examples; without it the loss is that of the sample that
            every run measures, or null
    places  row -> (x, y) on the map of hidden states
    """
    import pyarrow as pa

    train, held_out = view.rows.data.train, view.rows.data.eval
    sides, blocks = [train], [_training(view, scored, places)]
    if held_out is not None:
        sides.append(held_out)
        blocks.append(_texts(held_out, list(held_out.examples())) | {"held_out": [True] * len(held_out)})
        for name, stage in LOSSES.items():
            blocks[1][name] = _losses(view.path / stage / "eval.parquet", held_out)
    taken = {*blocks[0], "label"}
    for side, block in zip(sides, blocks, strict=True):
        if side.labels is not None:
            block["label"] = side.labels
        block |= {f"row_{name}" if name in taken else name: values for name, values in side.columns.items()}
    columns = {}
    for name in dict.fromkeys(name for block in blocks for name in block):
        values: list[Any] = []
        for side, block in zip(sides, blocks, strict=True):
            values += list(block.get(name, [None] * len(side)))
        try:
            columns[name] = pa.array(values, from_pandas=True)  # NaN is null
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # values of several types, as users' fields have
            columns[name] = pa.array([None if value is None else str(value) for value in values])
    return pa.table(columns)


def _training(
    view: RunView, scored: Mapping[str, Float64], places: Mapping[int, Sequence[float]]
) -> dict[str, Sequence[Any]]:
    scores, data, dynamics = view.scores, view.rows.data.train, view.dynamics
    columns: dict[str, Sequence[Any]] = {
        **_texts(data, view.examples),
        "held_out": [False] * len(data),
        "truncated": data.truncated.tolist(),
        "confidence": scores.confidence.tolist(),
        "variability": scores.variability.tolist(),
    }
    if view.groups:
        columns["group"] = view.groups
    if dynamics is not None:
        columns["correctness"] = correctness(view).tolist()
        for step, values in zip(dynamics.steps, perplexity(dynamics).T, strict=True):
            columns[f"perplexity_step_{step}"] = values.tolist()
    for name, stage in LOSSES.items():
        columns[name] = scored[name].tolist() if name in scored else _losses(view.path / stage / SAMPLE, data)
    on_map = np.array([places.get(row, (np.nan, np.nan)) for row in range(len(data))])
    return {**columns, "x": on_map[:, 0].tolist(), "y": on_map[:, 1].tolist()}


def _texts(data: EncodedDataset, examples: Sequence[Example]) -> dict[str, Sequence[Any]]:
    texts = [text_of(example) for example in examples]
    return {
        "id": list(data.ids),
        "source": [example.source for example in examples],
        "instruction": [instruction for instruction, _ in texts],
        "response": [response for _, response in texts],
        "response_tokens": data.n_targets.tolist(),
    }


def _losses(path: Path, data: EncodedDataset) -> list[float | None]:
    """Return the mean NLL per response token of each row, from eval.parquet or the sample; null where it has none."""
    import pandas as pd

    if not path.exists():
        return [None] * len(data)
    scores = pd.read_parquet(path).set_index("id")
    return list((scores.nll_sum / scores.n_tokens).reindex(data.ids))


def correctness(view: RunView) -> Float64:
    """Return f64[N], the share of response tokens that were the argmax, over the checkpoints; NaN where not counted."""
    dynamics = view.dynamics
    assert dynamics is not None
    counted = dynamics.scored & (dynamics.n_correct != NOT_COUNTED).all(axis=1)
    share = dynamics.n_correct.mean(axis=1) / np.maximum(dynamics.n_tokens, 1)
    return np.where(counted, share, np.nan)
