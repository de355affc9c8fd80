"""The losses of single examples that are kept of a table, so that later questions need no run directories.

In benchmarks/results/evidence/TABLE/losses lie `rows.parquet`, the rows that all runs of the table measure, and
ARM-seed-SEED.parquet of each run, a column of their losses in the same order. benchmarks/evidence/collect.py writes
them, and a later sitting adds its runs. `read_losses` gives them back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sftmix.disk.files import MANIFEST, placing  # noqa: E402
from sftmix.disk.tables import read_columns, read_dynamics  # noqa: E402
from sftmix.types import Float64, Int64  # noqa: E402
from sftmix.words.errors import ConfigError  # noqa: E402

HELD_OUT, SAMPLE = "held-out", "training sample"
ROWS = "rows.parquet"
Side = tuple[list[str], Int64, Float64]
"""The measured rows of a kind, ordered by id: ids, n_tokens i64[n], nll_sum f64[n] in nats."""


@dataclass(frozen=True)
class TableLosses:
    """N rows that all runs of a table measure, ordered by (rows, id), and the losses of each run on them.

    folder        holds the files
    rows          [N], HELD_OUT or SAMPLE: a held-out row, or one of the training rows that every run measures
    ids           [N], example ids, each a str
    n_tokens      i64[N], tokens of the response
    base_nll_sum  f64[N], nats, summed over the response, of the model before training
    """

    folder: Path
    rows: np.ndarray
    ids: np.ndarray
    n_tokens: Int64
    base_nll_sum: Float64

    def nll_sum(self, arm: str, seed: int) -> Float64 | None:
        """Return f64[N], nats, summed over the response, of a run after its last step; None for a run not kept.

        It is NaN for the sampled training rows if the run has other ones.
        """
        path = run_file(self.folder, arm, seed)
        return _read(path)["nll_sum"].to_numpy().astype(np.float64) if path.exists() else None


def read_losses(folder: Path) -> TableLosses | None:
    """Return what is kept in the folder TABLE/losses; None where nothing is."""
    if not (folder / ROWS).exists():
        return None
    table = _read(folder / ROWS)
    rows, ids = (np.array(table[name].to_pylist(), dtype=object) for name in ("rows", "id"))
    n_tokens, base = table["n_tokens"].to_numpy().astype(np.int64), table["base_nll_sum"].to_numpy()
    return TableLosses(folder, rows, ids, n_tokens, base.astype(np.float64))


def run_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-seed-{seed}.parquet"


# --------------------------------------------------------------------------------------------- writing


def keep_losses(runs: Iterable[tuple[Path, str, int]], folder: Path) -> None:
    """Write the losses of the finished runs to the folder, beside those of earlier sittings.

    The sampled training rows are those of the first run that was ever kept; a run with other ones keeps its held-out
    rows alone.

    runs  directory, arm and seed of each
    Raises ConfigError for a run with other held-out rows than those kept; the runs before it are kept then.
    """
    for run, arm, seed in runs:
        if all((run / stage / MANIFEST).exists() for stage in ("base", "train")):
            rows = read_losses(folder) or _write_rows(run / "base", folder)
            nll_sum = _losses_of(run / "train", rows).astype(np.float32)
            _write(run_file(folder, arm, seed), nll_sum=pa.array(nll_sum, from_pandas=True))


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
                f"{stage / 'eval.parquet'} has other held-out rows than {rows.folder / ROWS} was made from; collect "
                "this table under a name of its own, or move the kept losses away"
            )
    return losses


# ------------------------------------------------------------------------------------------------ files


def _write_rows(base: Path, folder: Path) -> TableLosses:
    sides = _sides(base)
    _write(
        folder / ROWS,
        rows=[name for name, (ids, _, _) in sides.items() for _ in ids],
        id=[example for ids, _, _ in sides.values() for example in ids],
        n_tokens=np.concatenate([n_tokens for _, n_tokens, _ in sides.values()]).astype(np.int32),
        base_nll_sum=np.concatenate([nll_sum for _, _, nll_sum in sides.values()]).astype(np.float32),
    )
    rows = read_losses(folder)
    assert rows is not None
    return rows


def _read(path: Path) -> pa.Table:
    with path.open("rb") as file:
        return pq.read_table(file)


def _write(path: Path, **columns: object) -> None:
    with placing(path) as staging:
        pq.write_table(pa.table(columns), staging, compression="zstd", write_statistics=False, store_schema=False)
