"""One table of all examples of a run, report/examples.parquet, for pandas, DuckDB or a viewer of embeddings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from sftmix.components.confidence import perplexity
from sftmix.data.dataset import instruction_and_response
from sftmix.disk.tables import read_columns
from sftmix.measure.model import SAMPLE
from sftmix.tools.report.run import RunView
from sftmix.types import Float64

FILE = Path("report") / "examples.parquet"

LOSSES = {"loss_before": "base", "loss_after": "train", "loss_after_baseline": "baseline"}
"""Columns of the mean NLL per response token (nats), and the stage that measured it."""


def examples_table(view: RunView, *, scored: Mapping[str, Float64 | None], places: Float64) -> pa.Table:
    """Return one line per example, training examples first, then the held-out ones.

    scored  column of LOSSES -> f64[N] in nats, of all training examples; without it the loss is from the sample that
            every run measures, or null
    places  f64[N, 2], x and y on the map of hidden states; NaN for examples that are not on it
    """
    train, held_out = view.rows.data.train, view.rows.data.eval
    blocks = []
    for side in [train] if held_out is None else [train, held_out]:
        examples = list(side.examples())
        instructions, responses = zip(*map(instruction_and_response, examples), strict=True)
        block = {
            "id": side.ids,
            "source": [example.source for example in examples],
            "instruction": instructions,
            "response": responses,
            "response_tokens": side.n_targets,
            "held_out": side is held_out,
        }
        if side is train:
            block |= _of_training(view)
        for name, stage in LOSSES.items():
            # Held-out rows are all measured by a run, training rows only in a sample.
            file = view.path / stage / (SAMPLE if side is train else "eval.parquet")
            if side is train and scored.get(name) is not None:
                block[name] = scored[name]
            elif file.exists():
                measured = read_columns(file, "id", "nll_sum", "n_tokens")
                mean_nll = pd.Series(measured["nll_sum"] / measured["n_tokens"], measured["id"])
                block[name] = mean_nll.reindex(side.ids).tolist()
        if side is train:
            block["x"], block["y"] = places.T  # [N, 2] -> two columns
            # Held-out rows have no group of ours, but their own is row_group as well: one column for all rows.
            taken = {*block, "label"}
        if side.labels is not None:
            block["label"] = side.labels
        block |= {f"row_{name}" if name in taken else name: values for name, values in side.columns.items()}
        blocks.append(pd.DataFrame(block, dtype=object))  # object: of held-out rows, numbers would become floats
    return _table_of(pd.concat(blocks, ignore_index=True))


def _of_training(view: RunView) -> dict[str, Any]:
    """Return the columns that only training examples have."""
    block = {
        "truncated": view.rows.data.train.truncated,
        "confidence": view.scores.confidence,
        "variability": view.scores.variability,
    }
    if view.split is not None:
        block["group"] = view.split.labels
    if view.dynamics is not None:
        block["correctness"] = view.correctness
        names = [f"perplexity_step_{step}" for step in view.dynamics.steps]
        block |= zip(names, perplexity(view.dynamics).T, strict=True)
    return block


def _table_of(frame: pd.DataFrame) -> pa.Table:
    columns = {}
    for name, values in frame.items():
        try:
            columns[name] = pa.array(values, from_pandas=True)  # NaN is null
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # values of several types, as users' fields have
            columns[name] = pa.array(values.map(str, na_action="ignore"), from_pandas=True)
    return pa.table(columns)
