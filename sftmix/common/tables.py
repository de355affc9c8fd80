"""The artefacts that stages keep as Parquet files, keyed by example id.

Files are written beside their place and moved there in one step: a reader sees a whole file or none. pyarrow is
imported on first use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sftmix.common.errors import DataError
from sftmix.common.files import replacing
from sftmix.types import (
    MOST_GROUPS,
    NOT_COUNTED,
    UNPAIRED,
    UNPAIRED_NAME,
    Float64,
    Int64,
    RowScores,
    Split,
    TrainingDynamics,
)

if TYPE_CHECKING:
    import pyarrow as pa


PathLike = str | os.PathLike[str]

_DEFAULT_NAMES = ("confident", "unconfident")

_NAMES_KEY = b"sftmix.groups"

_INTEGER_COLUMNS = ("checkpoint", "step", "n_tokens", "n_correct")


def write_dynamics(path: PathLike, dynamics: TrainingDynamics) -> None:
    """Write one line per example and checkpoint: id, checkpoint, step, nll_sum, n_tokens, n_correct.

    Also write alone_nll_sum and token_nll, if the dynamics have them.
    """
    import pyarrow as pa

    n, c = dynamics.nll_sum.shape
    columns = {
        "id": pa.array(np.repeat(np.asarray(dynamics.ids, dtype=object), c), type=pa.string()),
        "checkpoint": np.tile(np.arange(c, dtype=np.int64), n),
        "step": np.tile(dynamics.steps, n),
        "nll_sum": np.where(dynamics.scored[:, None], dynamics.nll_sum, 0.0).reshape(-1),
        "n_tokens": np.repeat(dynamics.n_tokens, c),
        "n_correct": dynamics.n_correct.reshape(-1),
    }
    if dynamics.alone_nll_sum is not None:
        columns["alone_nll_sum"] = np.where(dynamics.scored[:, None], dynamics.alone_nll_sum, 0.0).reshape(-1)
    if dynamics.token_nll is not None:
        flat = [np.asarray(nll, dtype=np.float32).reshape(-1) for nll in dynamics.token_nll]
        offsets = np.concatenate([[0], np.cumsum(np.repeat(dynamics.n_tokens, c))])
        values = pa.array(np.concatenate([*flat, np.empty(0, np.float32)]), type=pa.float32())
        columns["token_nll"] = pa.LargeListArray.from_arrays(pa.array(offsets, type=pa.int64()), values)
    _write(path, pa.table(columns))


def read_dynamics(path: PathLike) -> TrainingDynamics:
    """Read a dynamics file, in whatever order its lines are.

    Raises DataError if the file is missing, unreadable or not well formed: every example must have exactly one
    line for each checkpoint, with finite numbers that agree between the lines.
    """
    table = read_table(path, ["id", "checkpoint", "step", "nll_sum", "n_tokens", "n_correct"])
    encoded = table["id"].combine_chunks().dictionary_encode()
    ids = encoded.dictionary.to_pylist()
    example = encoded.indices.to_numpy().astype(np.int64)
    checkpoint = _numbers(path, table, "checkpoint")
    n, c = len(ids), int(checkpoint.max(initial=-1)) + 1
    _require(path, n > 0, "it holds no example")
    _require(path, bool((checkpoint >= 0).all()) and c <= len(table), "column checkpoint does not count 0, 1, 2, ...")
    lines = np.bincount(example * c + checkpoint, minlength=n * c)
    for problem, wrong in (("twice or more", lines > 1), ("missing", lines == 0)):
        at = int(np.argmax(wrong))
        _require(path, not wrong.any(), f"checkpoint {at % c} of example {ids[at // c]!r} is {problem}")

    order = np.argsort(example * c + checkpoint, kind="stable")
    grid = {k: _numbers(path, table, k)[order].reshape(n, c) for k in ("step", "n_tokens", "n_correct", "nll_sum")}
    _require(path, bool((grid["step"] == grid["step"][:1]).all()), "one checkpoint stands at several steps")
    dynamics = TrainingDynamics(
        ids=ids,
        steps=grid["step"][0],
        nll_sum=np.where(grid["n_tokens"] > 0, grid["nll_sum"], 0.0),
        n_tokens=grid["n_tokens"][:, 0],
        n_correct=grid["n_correct"],
        token_nll=_read_token_nll(path, table, order, grid["n_tokens"]),
        alone_nll_sum=_read_alone(path, table, order, (n, c)),
    )
    _check_dynamics(path, dynamics, grid["n_tokens"])
    return dynamics


def write_confidence(path: PathLike, ids: Sequence[str], confidence: Float64, variability: Float64) -> None:
    """Write id, confidence, variability; both f64[N], NaN where an example was not scored."""
    import pyarrow as pa

    _write(path, pa.table({"id": pa.array(ids, pa.string()), "confidence": confidence, "variability": variability}))


def read_confidence(path: PathLike) -> tuple[list[str], Float64, Float64]:
    """Return (ids, confidence f64[N], variability f64[N])."""
    table = read_table(path, ["id", "confidence", "variability"])
    ids = _unique_ids(path, table)
    confidence, variability = (table[name].to_numpy().astype(np.float64) for name in ("confidence", "variability"))
    return ids, confidence, variability


def write_split(path: PathLike, ids: Sequence[str], split: Split) -> None:
    """Write exactly id and group (a group's name or `unpaired`); the order of the names goes to the metadata."""
    import pyarrow as pa

    if UNPAIRED_NAME in split.names:
        raise DataError(f"a split names a group {UNPAIRED_NAME!r}; that name is kept for examples in no group")
    table = pa.table({"id": pa.array(ids, pa.string()), "group": pa.array(split.labels, pa.string())})
    _write(path, table.replace_schema_metadata({_NAMES_KEY: json.dumps(split.names)}))


def read_split(path: PathLike) -> tuple[list[str], Split]:
    """Return (ids, split). A file of other origin may use only confident, unconfident and unpaired."""
    table = read_table(path, ["id", "group"])
    ids = _unique_ids(path, table)
    stored = (table.schema.metadata or {}).get(_NAMES_KEY)
    names = tuple(json.loads(stored)) if stored else _DEFAULT_NAMES
    _require(path, len(names) <= MOST_GROUPS, f"it names {len(names)} groups, and a split has at most {MOST_GROUPS}")
    code = {name: index for index, name in enumerate(names)} | {UNPAIRED_NAME: UNPAIRED}
    groups = table["group"].to_pylist()
    unknown = next((g for g in groups if g not in code), None)
    _require(path, all(g in code for g in groups), f"group {unknown!r} is none of {', '.join(code)}")
    return ids, Split(group=np.asarray([code[g] for g in groups], dtype=np.int8), names=names)


def write_hashes(path: PathLike, ids: Sequence[str], hashes: Sequence[str]) -> None:
    """Write id and hash, the hash of each example's text."""
    import pyarrow as pa

    _write(path, pa.table({"id": pa.array(ids, pa.string()), "hash": pa.array(hashes, pa.string())}))


def read_hashes(path: PathLike) -> tuple[list[str], list[str]]:
    """Return (ids, hashes)."""
    table = read_table(path, ["id", "hash"])
    return _unique_ids(path, table), [str(value) for value in table["hash"].to_pylist()]


def write_ids(path: PathLike, ids: Sequence[str]) -> None:
    """Write one column, id."""
    import pyarrow as pa

    _write(path, pa.table({"id": pa.array(ids, pa.string())}))


def read_ids(path: PathLike) -> list[str]:
    """Return the ids of a file that has a column id, each once."""
    return _unique_ids(path, read_table(path, ["id"]))


def write_eval(path: PathLike, ids: Sequence[str], scores: RowScores, brier_sum: Float64 | None = None) -> None:
    """Write one line per held-out example: id, nll_sum (nats), n_tokens, n_correct, and brier_sum if it is given."""
    import pyarrow as pa

    columns = {"nll_sum": scores.nll_sum, "n_tokens": scores.n_tokens, "n_correct": scores.n_correct}
    if brier_sum is not None:
        columns["brier_sum"] = brier_sum
    _write(path, pa.table({"id": pa.array(ids, pa.string()), **columns}))


def read_eval(path: PathLike) -> tuple[list[str], RowScores, Float64 | None]:
    """Return (ids, scores, brier_sum f64[N]) of the held-out examples; brier_sum is None where it was not measured.

    Raises DataError if `write_eval` did not write the file.
    """
    table = read_table(path, ["id", "nll_sum", "n_tokens", "n_correct"])
    ids = _unique_ids(path, table)
    nll, count, correct = (_numbers(path, table, name) for name in ("nll_sum", "n_tokens", "n_correct"))
    brier_sum = _numbers(path, table, "brier_sum") if "brier_sum" in table.column_names else None
    return ids, RowScores(nll, count, correct), brier_sum


# ------------------------------------------------------------------------------------------- details


def _check_dynamics(path: PathLike, dynamics: TrainingDynamics, n_tokens_NC: Int64) -> None:
    n_tokens = dynamics.n_tokens[:, None]
    rules = (
        ("n_tokens differs between the checkpoints", n_tokens_NC == n_tokens),
        ("n_tokens is negative", n_tokens_NC >= 0),
        ("nll_sum is not finite", np.isfinite(dynamics.nll_sum)),
        ("nll_sum is negative", dynamics.nll_sum >= 0),
        ("n_correct is not in 0..n_tokens", (dynamics.n_correct >= NOT_COUNTED) & (dynamics.n_correct <= n_tokens)),
    )
    for problem, holds in rules:
        bad = np.flatnonzero(~holds.all(axis=1))
        which = dynamics.ids[bad[0]] if len(bad) else ""
        _require(path, not len(bad), f"{problem} for {len(bad)} examples, first {which!r}")


def _read_token_nll(
    path: PathLike, table: pa.Table, order: Int64, n_tokens_NC: Int64
) -> list[npt.NDArray[np.float32]] | None:
    if "token_nll" not in table.column_names:
        return None
    import pyarrow as pa

    nested = table["token_nll"].cast(pa.large_list(pa.float32())).combine_chunks().take(pa.array(order))
    lengths = np.diff(nested.offsets.to_numpy())
    _require(path, bool((lengths == n_tokens_NC.reshape(-1)).all()), "token_nll has another length than n_tokens")
    per_example = np.split(nested.flatten().to_numpy(), np.cumsum(n_tokens_NC.sum(axis=1))[:-1])
    return [nll.reshape(n_tokens_NC.shape[1], -1) for nll in per_example]


def _read_alone(path: PathLike, table: pa.Table, order: Int64, shape: tuple[int, int]) -> Float64 | None:
    if "alone_nll_sum" not in table.column_names:
        return None
    values = _numbers(path, table, "alone_nll_sum")[order].reshape(shape)
    _require(path, bool(np.isfinite(values).all() and (values >= 0).all()), "alone_nll_sum is not finite or negative")
    return values


def _numbers(path: PathLike, table: pa.Table, name: str) -> npt.NDArray:
    import pyarrow as pa

    wanted = pa.int64() if name in _INTEGER_COLUMNS else pa.float64()
    try:
        return table[name].cast(wanted).to_numpy()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: column {name} does not hold {wanted} numbers: {error}") from error


def _unique_ids(path: PathLike, table: pa.Table) -> list[str]:
    ids: list[str] = table["id"].to_pylist()
    _require(path, len(set(ids)) == len(ids), "an example id is there twice")
    return ids


def _require(path: PathLike, holds: bool, problem: str) -> None:
    if not holds:
        raise DataError(f"{path}: {problem}; write the file again with the stage that makes it")


def read_table(path: PathLike, columns: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file:  # of a name alone pyarrow makes a URL, which it would fetch
            table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    _require(path, not missing, f"columns {missing} are missing (it has {table.column_names})")
    nulls = [name for name in columns if table[name].null_count]
    _require(path, not nulls, f"columns {nulls} have empty cells")
    text = [name for name in ("id", "group") if name in columns]
    for name in text:
        _require(
            path,
            pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type),
            f"column {name} must hold text, not {table[name].type}",
        )
    return table


def _write(path: PathLike, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with replacing(Path(path)) as file:
        pq.write_table(table, file)
