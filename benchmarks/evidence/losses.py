"""The losses of single examples that are kept of a table, so that later questions need no run directories.

In benchmarks/results/evidence/TABLE/losses lie `rows.parquet`, the rows that all runs of the table measure, and
ARM-seed-SEED.parquet of each run, a column of their losses in the same order. benchmarks/evidence/collect.py writes
them, and a later sitting adds its runs. `read_losses` gives them back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.topics import topics_of  # noqa: E402
from sftmix.common.errors import ConfigError  # noqa: E402
from sftmix.common.files import MANIFEST, replacing  # noqa: E402
from sftmix.common.tables import read_dynamics, read_eval, read_split  # noqa: E402
from sftmix.types import Float64, Int64  # noqa: E402

if TYPE_CHECKING:
    import pyarrow as pa

HELD_OUT, SAMPLE = "held-out", "training sample"
ROWS = "rows.parquet"
Names = npt.NDArray[np.object_]
"""[N], each a str or None."""


@dataclass(frozen=True)
class TableLosses:
    """N rows that all runs of a table measure, ordered by (rows, id), and the losses of each run on them.

    folder        holds the files
    rows          [N], HELD_OUT or SAMPLE: a held-out row, or one of the training rows that every run measures
    ids           [N], example ids
    n_tokens      i64[N], tokens of the response
    base_nll_sum  f64[N], nats, summed over the response, of the model before training
    half          [N], half of the split by confidence; None for held-out rows, and where it is not known
    topic         [N], most typical words of the topic of the instruction; None where it is not known
    """

    folder: Path
    rows: Names
    ids: Names
    n_tokens: Int64
    base_nll_sum: Float64
    half: Names
    topic: Names

    def nll_sum(self, arm: str, seed: int) -> Float64 | None:
        """Return f64[N], nats, summed over the response, of a run after its last step; None for a run not kept.

        It is NaN for the sampled training rows if the run has other ones.
        """
        path = run_file(self.folder, arm, seed)
        return _read(path)["nll_sum"].to_numpy().astype(np.float64) if path.exists() else None

    def seeds(self, arm: str) -> list[int]:
        """Return the seeds whose runs are kept."""
        found = (path.stem.rpartition("-seed-") for path in self.folder.glob("*-seed-*.parquet"))
        return sorted(int(seed) for name, _, seed in found if name == arm)


def read_losses(folder: Path) -> TableLosses | None:
    """Return what is kept in the folder TABLE/losses; None where nothing is."""
    if not (folder / ROWS).exists():
        return None
    table = _read(folder / ROWS)
    rows, ids, half, topic = (
        np.array(table[name].to_pylist(), dtype=object) for name in ("rows", "id", "half", "topic")
    )
    n_tokens, base = table["n_tokens"].to_numpy().astype(np.int64), table["base_nll_sum"].to_numpy()
    return TableLosses(folder, rows, ids, n_tokens, base.astype(np.float64), half, topic)


def run_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-seed-{seed}.parquet"


# --------------------------------------------------------------------------------------------- writing


def keep_losses(runs: Iterable[tuple[Path, str, int]], halves: Path, folder: Path) -> None:
    """Write the losses of the finished runs to the folder, beside those of earlier sittings.

    The sampled training rows are those of the first run that was ever kept; a run with other ones keeps its held-out
    rows alone. What was not known of the rows, half or topic, is added as soon as it is.

    runs    directory, arm and seed of each
    halves  directory of the arm whose split by confidence tells the halves
    Raises ConfigError for a run with other held-out rows than those kept; the runs before it are kept then.
    """
    finished = [run for run in runs if all((run[0] / stage / MANIFEST).exists() for stage in ("base", "train"))]
    if not finished:
        return
    rows = read_losses(folder) or _rows_of(finished[0][0] / "base", folder)
    if not any(rows.half):
        rows = replace(rows, half=_halves(rows, [halves / f"seed-{seed}" for _, _, seed in finished]))
    if not any(rows.topic):
        rows = replace(rows, topic=_topics(rows, finished[0][0]))
    _write_rows(rows)
    for run, arm, seed in finished:
        _write_run(run_file(folder, arm, seed), _losses_of(run / "train", rows))


class _Side(NamedTuple):
    """The measured rows of a kind, ordered by id: ids, n_tokens i64[n], nll_sum f64[n] in nats."""

    ids: list[str]
    n_tokens: Int64
    nll_sum: Float64


def _sides(stage: Path) -> dict[str, _Side]:
    ids, scores, _ = read_eval(stage / "eval.parquet")
    sample = read_dynamics(stage / "sample.parquet")
    return {
        HELD_OUT: _ordered(ids, scores.n_tokens, scores.nll_sum),
        SAMPLE: _ordered(sample.ids, sample.n_tokens, sample.nll_sum[:, -1]),
    }


def _ordered(ids: Sequence[str], n_tokens: Int64, nll_sum: Float64) -> _Side:
    order = sorted(range(len(ids)), key=lambda k: ids[k])
    return _Side([ids[k] for k in order], n_tokens[order], nll_sum[order])


def _rows_of(base: Path, folder: Path) -> TableLosses:
    sides = _sides(base)
    ids = [example for side in sides.values() for example in side.ids]
    nothing = np.full(len(ids), None, dtype=object)
    return TableLosses(
        folder,
        np.array([rows for rows, side in sides.items() for _ in side.ids], dtype=object),
        np.array(ids, dtype=object),
        np.concatenate([side.n_tokens for side in sides.values()]),
        np.concatenate([side.nll_sum for side in sides.values()]),
        nothing,
        nothing,
    )


def _losses_of(stage: Path, rows: TableLosses) -> Float64:
    """Return f64[N] of a run in the order of the rows, NaN for sampled rows that it does not have."""
    found = np.full(len(rows.ids), np.nan)
    for name, side in _sides(stage).items():
        own = rows.rows == name
        if side.ids == rows.ids[own].tolist() and (side.n_tokens == rows.n_tokens[own]).all():
            found[own] = side.nll_sum
        elif name == HELD_OUT:
            raise ConfigError(
                f"{stage / 'eval.parquet'} has other held-out rows than {rows.folder / ROWS} was made from; collect "
                "this table under a name of its own, or move the kept losses away"
            )
    return found


def _halves(rows: TableLosses, runs: Iterable[Path]) -> Names:
    """Return the half of each sampled row, by the first split that has all of these rows."""
    sample = rows.rows == SAMPLE
    found = np.full(len(rows.ids), None, dtype=object)
    for path in (run / "split" / "split.parquet" for run in runs):
        if path.exists():
            ids, split = read_split(path)
            half = {i: split.names[g] for i, g in zip(ids, split.group.tolist(), strict=True) if g >= 0}
            if set(rows.ids[sample]) <= set(ids):
                found[sample] = [half.get(i) for i in rows.ids[sample]]
                break
    return found


def _topics(rows: TableLosses, run: Path) -> Names:
    sample = rows.rows == SAMPLE
    found = np.full(len(rows.ids), None, dtype=object)
    found[~sample], found[sample] = topics_of(run, rows.ids[~sample].tolist(), rows.ids[sample].tolist())
    return found


# ------------------------------------------------------------------------------------------------ files


def _read(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        return pq.read_table(file)


def _write_rows(rows: TableLosses) -> None:
    import pyarrow as pa

    columns = {
        "rows": pa.array(rows.rows, pa.string()),
        "id": pa.array(rows.ids, pa.string()),
        "n_tokens": pa.array(rows.n_tokens, pa.int32()),
        "base_nll_sum": pa.array(rows.base_nll_sum.astype(np.float32)),
        "half": pa.array(rows.half, pa.string()),
        "topic": pa.array(rows.topic, pa.string()),
    }
    _write(rows.folder / ROWS, pa.table(columns))


def _write_run(path: Path, nll_sum: Float64) -> None:
    import pyarrow as pa

    _write(path, pa.table({"nll_sum": pa.array(nll_sum.astype(np.float32), mask=np.isnan(nll_sum))}))


def _write(path: Path, table: pa.Table) -> None:
    """Write a table in one step, unless it is there already: another pyarrow would write the same values otherwise."""
    import pyarrow.parquet as pq

    if path.exists() and _read(path).equals(table):
        return
    with replacing(path) as file:
        names = ["rows", "half", "topic"]  # text that repeats
        pq.write_table(
            table, file, compression="zstd", use_dictionary=names, write_statistics=False, store_schema=False
        )
