"""A collected table in one file, RESULTS/NAME.parquet: a line for each run.

    arm, seed  of the run
    FIGURE     of its summary, or of real/answers.py; a nested one is JSON; null: the run has no such figure
    losses     of single examples, a list of none or of N rows that all runs of the table measure, each with
                   rows          HELD_OUT, or SAMPLE: one of the training rows
                   id            of the example
                   n_tokens      of the response
                   base_nll_sum  nats, summed over the response, of the model before training
                   nll_sum       the same after the last step; null for sampled training rows if the run has other ones
                   half, topic   of a row, null: of none; only in the tables of the first study

The metadata of the file are JSON: `about` has variants, options, seeds and versions of the table, and what is kept
beside its runs (the figures of a reference, the answers of the base model); `nested` has the names of nested figures.

    pandas.read_parquet("NAME.parquet")                   a line a run
    SELECT arm, seed, unnest(losses) FROM 'NAME.parquet'  a line an example of a run, in DuckDB
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sftmix.disk.files import placing  # noqa: E402
from sftmix.types import Float64, Int64  # noqa: E402

HELD_OUT, SAMPLE = "held-out", "training sample"
LOSSES = {
    "rows": pa.string(),
    "id": pa.string(),
    "n_tokens": pa.int32(),
    "base_nll_sum": pa.float32(),
    "nll_sum": pa.float32(),
}
Run = tuple[str, int]
"""Arm and seed."""


@dataclass(frozen=True)
class TableLosses:
    """N rows that all runs of a table measure, ordered by (rows, id), and the losses of each run on them.

    rows          [N], HELD_OUT or SAMPLE: a held-out row, or one of the training rows that every run measures
    ids           [N], example ids, each a str
    n_tokens      i64[N], tokens of the response
    base_nll_sum  f64[N], nats, summed over the response, of the model before training
    nll_sum       run -> f64[N], the same after its last step; NaN for the sampled training rows if it has other ones
    groups        name -> [N], the group of each row, a str or None: `half` and `topic`, or nothing
    """

    rows: np.ndarray
    ids: np.ndarray
    n_tokens: Int64
    base_nll_sum: Float64
    nll_sum: dict[Run, Float64] = field(default_factory=dict)
    groups: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Study:
    """What is kept of a table.

    about   variants, options, seeds and versions of the table, and what is kept beside its runs
    runs    figures of each run; of one that diverged, seed and exit code
    losses  of single examples; None if no run has them
    """

    about: dict[str, Any] = field(default_factory=dict)
    runs: dict[Run, dict[str, Any]] = field(default_factory=dict)
    losses: TableLosses | None = None


# --------------------------------------------------------------------------------------------- reading


def read_study(file: Path) -> Study:
    """Return what is in the file, which is nothing if it is not there."""
    if not file.exists():
        return Study()
    with file.open("rb") as opened:  # given a name, pyarrow makes a URL of it
        table = pq.read_table(opened)
    about, nested = (json.loads(table.schema.metadata[key]) for key in (b"about", b"nested"))
    runs = {}
    for line in table.drop_columns("losses").to_pylist():
        figures = {name: value for name, value in line.items() if value is not None}
        figures |= {name: json.loads(figures[name]) for name in nested if name in figures}
        runs[figures.pop("arm"), figures["seed"]] = figures
    return Study(about, runs, _losses(table["losses"].combine_chunks(), list(runs)))


def _losses(column: pa.ListArray, runs: list[Run]) -> TableLosses | None:
    measured, offsets = column.flatten(), column.offsets.to_numpy()
    fields = {kind.name: measured.field(kind.name).to_numpy(zero_copy_only=False) for kind in measured.type}
    of_run = {run: slice(*offsets[place : place + 2]) for place, run in enumerate(runs)}
    there = {run: lines for run, lines in of_run.items() if lines.start < lines.stop}
    if not there:
        return None
    first = next(iter(there.values()))  # the rows of all runs are the same
    return TableLosses(
        fields["rows"][first],
        fields["id"][first],
        fields["n_tokens"][first].astype(np.int64),
        fields["base_nll_sum"][first].astype(np.float64),
        {run: fields["nll_sum"][lines].astype(np.float64) for run, lines in there.items()},
        {name: groups[first] for name, groups in fields.items() if name not in LOSSES},
    )


# --------------------------------------------------------------------------------------------- writing


def write_study(file: Path, study: Study) -> None:
    """Write the file in one step; runs are ordered by arm and seed."""
    runs = sorted(study.runs)
    names = dict.fromkeys(name for run in runs for name in study.runs[run])
    columns: dict[str, Any] = {"arm": pa.array([arm for arm, _ in runs], pa.string())}
    columns["seed"] = pa.array([seed for _, seed in runs], pa.int64())
    nested = []
    for name in [name for name in names if name != "seed"]:
        values = [study.runs[run].get(name) for run in runs]
        if not _are_plain(values):
            nested.append(name)
            values = [None if value is None else json.dumps(value) for value in values]
        columns[name] = pa.array(values)
    columns["losses"] = _column(study.losses, runs)
    metadata = {"about": json.dumps(study.about), "nested": json.dumps(nested)}
    # Each run repeats ids and texts: zstd at its level 19 sees that, but not behind the indices of a dictionary.
    small = {"use_dictionary": False, "compression": "zstd", "compression_level": 19, "write_statistics": False}
    with placing(file) as staging:
        pq.write_table(pa.table(columns, metadata=metadata), staging, **small)


def _are_plain(values: list[Any]) -> bool:
    """Return True if all values that are there are numbers or texts of one type."""
    types = {type(value) for value in values if value is not None}
    return len(types) == 1 and types <= {int, float, str}


def _column(losses: TableLosses | None, runs: list[Run]) -> pa.ListArray:
    kept = losses.nll_sum if losses else {}
    sizes = [len(kept.get(run, ())) for run in runs]
    every = dict.fromkeys(LOSSES, np.array([]))
    if losses and any(sizes):
        values = losses.rows, losses.ids, losses.n_tokens, losses.base_nll_sum
        of_rows = dict(zip(LOSSES, values, strict=False)) | losses.groups
        every = {name: np.tile(column, np.count_nonzero(sizes)) for name, column in of_rows.items()}
        every["nll_sum"] = np.concatenate([kept[run] for run in runs if run in kept])
    columns = [pa.array(x, from_pandas=True).cast(LOSSES.get(name, pa.string())) for name, x in every.items()]
    offsets = np.cumsum([0, *sizes]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, [*every]))
