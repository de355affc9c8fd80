"""The losses of single examples of the runs of a table, so that later questions need no run directories."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.study import HELD_OUT, SAMPLE, TableLosses  # noqa: E402
from sftmix.disk.files import MANIFEST, placing  # noqa: E402
from sftmix.disk.tables import read_columns, read_dynamics  # noqa: E402
from sftmix.types import Float64, Int64  # noqa: E402
from sftmix.words.errors import ConfigError  # noqa: E402

Side = tuple[list[str], Int64, Float64]
"""The measured rows of a kind, ordered by id: ids, n_tokens i64[n], nll_sum f64[n] in nats."""


def with_losses(kept: TableLosses | None, runs: Iterable[tuple[Path, str, int]]) -> TableLosses | None:
    """Return the losses that are kept and those of the finished runs.

    The sampled training rows are those of the first run that was ever kept; a run with other ones keeps its held-out
    rows alone.

    runs  directory, arm and seed of each
    Raises ConfigError for a run with other held-out rows than those kept.
    """
    for run, arm, seed in runs:
        if all((run / stage / MANIFEST).exists() for stage in ("base", "train")):
            kept = kept or _rows_of(run / "base")
            nll_sum = _losses_of(run / "train", kept).astype(np.float32).astype(np.float64)  # as it is read back
            kept = replace(kept, nll_sum=kept.nll_sum | {(arm, seed): nll_sum})
    return kept


def _rows_of(base: Path) -> TableLosses:
    sides = _sides(base)
    ids, n_tokens, nll_sum = zip(*sides.values(), strict=True)
    return TableLosses(
        np.array([name for name, side in sides.items() for _ in side[0]], dtype=object),
        np.array([example for some in ids for example in some], dtype=object),
        np.concatenate(n_tokens),
        np.concatenate(nll_sum).astype(np.float32).astype(np.float64),
    )


def _sides(stage: Path) -> dict[str, Side]:
    table = read_columns(stage / "eval.parquet", "id", "nll_sum", "n_tokens")
    sample = read_dynamics(stage / "sample.parquet")
    return {
        HELD_OUT: _ordered(table["id"], table["n_tokens"], table["nll_sum"]),
        SAMPLE: _ordered(sample.ids, sample.n_tokens, sample.nll_sum[:, -1]),
    }


def _ordered(ids: Sequence[str], n_tokens: Int64, nll_sum: Float64) -> Side:
    order = sorted(range(len(ids)), key=lambda k: ids[k])
    return [ids[k] for k in order], n_tokens[order], nll_sum[order]


def _losses_of(stage: Path, rows: TableLosses) -> Float64:
    """Return f64[N] of a run in the order of the rows, NaN for sampled rows that it does not have."""
    losses = np.full(len(rows.ids), np.nan)
    for name, (ids, n_tokens, nll_sum) in _sides(stage).items():
        side = rows.rows == name
        if ids == rows.ids[side].tolist() and (n_tokens == rows.n_tokens[side]).all():
            losses[side] = nll_sum
        elif name == HELD_OUT:
            raise ConfigError(
                f"{stage / 'eval.parquet'} has other held-out rows than the runs that are kept; collect this table "
                "under a name of its own, or move the file of the kept ones away"
            )
    return losses


def _write(path: Path, **columns: object) -> None:
    """Write a file of losses of one run (regularises/run.py)."""
    with placing(path) as staging:
        pq.write_table(pa.table(columns), staging, compression="zstd", write_statistics=False, store_schema=False)
