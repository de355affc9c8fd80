"""The artefacts that stages keep as Parquet files, keyed by example id.

Files are written beside their place and moved there in one step: a reader sees a whole file or none. pyarrow is
imported on first use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftmix.disk.files import placing
from sftmix.disk.places import PathLike, place_of
from sftmix.disk.regular import regular
from sftmix.disk.texts import decoded
from sftmix.types import (
    MOST_GROUPS,
    OF_TOKENS,
    UNPAIRED,
    UNPAIRED_NAME,
    Float32,
    Float64,
    RowLosses,
    Split,
    TrainingDynamics,
)
from sftmix.types.impossible import impossible_numbers
from sftmix.words.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_DEFAULT_NAMES = ("confident", "unconfident")
_NAMES_KEY = b"sftmix.groups"
_TYPES = dict.fromkeys(("id", "group", "hash"), "string")
_TYPES |= dict.fromkeys(("checkpoint", "step", "n_tokens", "n_correct"), "int64")
"""Types of columns by name; others are float64, numbers of tokens a list of float32, and a state one of float16."""


# ------------------------------------------------------------------------------------------- any table


def existing_file(key: str, path: PathLike) -> str:
    """Return the path of an option; DataError if there is no such file. A run asks before it stores its inputs."""
    if not os.path.isfile(place_of(path)):
        raise DataError(f"{key}: {path}: there is no such file")
    return os.fspath(path)


def read_counts(key: str, path: PathLike) -> Float64:
    """Return f64[n], the counts or shares by number in a .npy file or a list in JSON, up to the last above 0.

    Raises DataError, which names the option, for other numbers.
    """
    place, problem = place_of(path), f"{key}: {path}: it must be a list of finite numbers from 0, some above 0"
    try:
        given = np.asarray(
            np.load(place) if place.suffix == ".npy" else json.loads(place.read_bytes(), parse_int=float)
        )
    except (ValueError, EOFError, RecursionError) as error:
        raise DataError(f"{problem} ({error})") from error
    # not text, objects, truth values or complex numbers, which NumPy would take for others
    if given.dtype.kind not in "uif" or given.ndim != 1:
        raise DataError(problem)
    counts = given.astype(np.float64)  # a sum of integers or of float16 may overflow
    if not (counts >= 0).all() or not 0 < counts.sum() < np.inf:
        raise DataError(problem)
    return np.trim_zeros(counts, "b")


def write_table(path: PathLike, ids: Sequence[str], metadata: dict[bytes, str] | None = None, **columns: Any) -> None:
    """Write a column of ids and others: arrays, or lists of text. None leaves a column out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(column, _type_of(name)) for name, column in {"id": ids, **columns}.items() if column is not None
    }
    with placing(Path(path)) as staging, staging.open("wb") as file:
        pq.write_table(pa.table(arrays, metadata=metadata), file)


def read_table(path: PathLike, columns: Sequence[str]) -> pa.Table:
    """Return the table in a Parquet or CSV file; DataError if it cannot be read or lacks one of these columns."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    text = pa.csv.ConvertOptions(column_types={"id": pa.string()})  # an id 007 stays so
    kind = "CSV" if os.fspath(path).endswith(".csv") else "Parquet"
    try:
        with regular(Path(path)).open("rb") as file:  # given only a name, pyarrow makes a URL of it and fetches that
            if kind == "CSV":
                decoded(file.peek(4)[:4], "ignore")  # raises the error of another encoding
            table = pa.csv.read_csv(file, convert_options=text) if kind == "CSV" else pq.read_table(file)
    except (OSError, ValueError) as error:  # pyarrow's are of both kinds
        raise DataError(f"{path}: cannot be read as {kind}: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    _require(path, not missing, f"columns {missing} are missing (it has {table.column_names})")
    _require(path, len({*table.column_names}) == len(table.column_names), "a column is there twice")
    return table


def read_columns(
    path: PathLike, *names: str, optional: Sequence[str] = (), of: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return columns of a Parquet file by their names: text as list[str], integers as i64[N], other numbers as f64[N].

    The fields of OF_TOKENS are arrays of arrays, f32, and the state f16; `metadata` are the file's own texts, as bytes.

    optional  columns that are None if the file has none
    of        the ids of the lines to return, in this order; None: the lines are returned in the order of the file
    Raises DataError as `read_table`, for empty cells or other values in a column, for an id that is there twice in a
    file without checkpoints, and for ids that are not those of `of`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = read_table(path, names)
    if of is not None:
        places = pc.index_in(pa.array(of), _cast(path, table, "id"))
        same = len(of) == len(table) and not places.null_count  # ids of rows are there once
        _require(path, same, f"it is of other examples than the {len(of):,} rows, their selection and data.max_length")
        table = table.take(places)
    columns: dict[str, Any] = {"metadata": table.schema.metadata or {}, **dict.fromkeys(optional)}
    for name in {*names, *optional} & {*table.column_names}:
        _require(path, not table[name].null_count, f"column {name} has empty cells")
        column = _cast(path, table, name)
        columns[name] = column.to_pylist() if _TYPES.get(name) == "string" else column.to_numpy()
    _require(path, "checkpoint" in names or len({*columns["id"]}) == len(table), "an example id is there twice")
    return columns


def _cast(path: PathLike, table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column of its type; DataError if it holds other values, as 2.5 in a column of integers."""
    import pyarrow as pa

    try:
        return table[name].cast(_type_of(name))
    except pa.ArrowException as error:
        raise DataError(f"{path}: column {name} does not hold {_type_of(name)}: {error}") from error


def _type_of(name: str) -> pa.DataType:
    import pyarrow as pa

    if name == "state":
        return pa.large_list(pa.float16())
    return pa.large_list(pa.float32()) if name in OF_TOKENS else pa.type_for_alias(_TYPES.get(name, "float64"))


def _require(path: PathLike, holds: bool, problem: str) -> None:
    if not holds:
        by_hand = os.fspath(path).endswith(".csv")  # which no stage writes
        remedy = "correct the file" if by_hand else "write the file again with the stage that makes it"
        raise DataError(f"{path}: {problem}; {remedy}")


# ------------------------------------------------------------------------------------------- tables of examples


def write_split(path: PathLike, ids: Sequence[str], split: Split) -> None:
    """Write exactly id and group (a group's name or `unpaired`); the order of the names goes to the metadata."""
    write_table(path, ids, {_NAMES_KEY: json.dumps(split.names)}, group=split.labels)


def read_split(path: PathLike, *, of: Sequence[str] | None = None) -> tuple[list[str], Split]:
    """Return (ids, split). A file of other origin may use only confident, unconfident and unpaired.

    of  as in `read_columns`
    """
    table = read_columns(path, "id", "group", of=of)
    stored = table["metadata"].get(_NAMES_KEY)
    try:
        names = tuple(json.loads(stored)) if stored else _DEFAULT_NAMES  # without them: of another program
    except (ValueError, TypeError, RecursionError):
        names = (None,)
    _require(path, all(isinstance(name, str) for name in names), "the names of its groups are no list of texts")
    _require(path, len(names) <= MOST_GROUPS, f"it names {len(names)} groups, and a split has at most {MOST_GROUPS}")
    code = {name: index for index, name in enumerate(names)} | {UNPAIRED_NAME: UNPAIRED}
    unknown = [name for name in table["group"] if name not in code]
    _require(path, not unknown, f"group {unknown[:1]} is none of {', '.join(code)}")
    return table["id"], Split(group=np.asarray([code[g] for g in table["group"]], dtype=np.int8), names=names)


def write_eval(path: PathLike, ids: Sequence[str], scores: RowLosses, brier_sum: Float64 | None = None) -> None:
    """Write one line per held-out example: id, nll_sum (nats), n_tokens, n_correct, and brier_sum if it is given."""
    write_table(
        path, ids, nll_sum=scores.nll_sum, n_tokens=scores.n_tokens, n_correct=scores.n_correct, brier_sum=brier_sum
    )


# ------------------------------------------------------------------------------------------- training dynamics


def write_dynamics(path: PathLike, dynamics: TrainingDynamics) -> None:
    """Write one line per example and checkpoint: id, checkpoint, step, nll_sum, n_tokens, n_correct.

    Also write alone_nll_sum, the fields of OF_TOKENS and, in the line of the last checkpoint, the state, if the
    dynamics have them.
    """
    n, c = dynamics.nll_sum.shape
    scored, alone = dynamics.scored[:, None], dynamics.alone_nll_sum
    of_tokens: dict[str, Any] = {name: _lines(getattr(dynamics, name)) for name in OF_TOKENS}
    # Line n * C + c is example n at checkpoint c: [N, C] arrays are flattened.
    write_table(
        path,
        [example for example in dynamics.ids for _ in range(c)],
        checkpoint=np.tile(np.arange(c, dtype=np.int64), n),
        step=np.tile(dynamics.steps, n),
        nll_sum=np.where(scored, dynamics.nll_sum, 0.0).reshape(-1),
        n_tokens=np.repeat(dynamics.n_tokens, c),
        n_correct=dynamics.n_correct.reshape(-1),
        alone_nll_sum=None if alone is None else np.where(scored, alone, 0.0).reshape(-1),
        state=_states(dynamics),
        **of_tokens,
    )


def _states(dynamics: TrainingDynamics) -> list[Any] | None:
    """Return the state of each example in the line of its last checkpoint, and an empty one in the others."""
    states, others = dynamics.states, len(dynamics.steps) - 1
    return None if states is None else [line for state in states for line in (*[state[:0]] * others, state)]


def _lines(tokens: Sequence[Float32] | None) -> list[Any] | None:
    """Return the numbers of the tokens of each example at each checkpoint, in half the bytes."""
    return None if tokens is None else [line for one in tokens for line in np.asarray(one, np.float16)]


def read_dynamics(path: PathLike) -> TrainingDynamics:
    """Read a dynamics file, in whatever order its lines are.

    Raises DataError if the file is missing, unreadable or not well formed: every example must have exactly one
    line for each checkpoint, with finite numbers that agree between the lines.
    """
    names = ("id", "checkpoint", "step", "nll_sum", "n_tokens", "n_correct")
    optional = ("alone_nll_sum", "state", *OF_TOKENS)
    table = read_columns(path, *names, optional=optional)
    place = {example: index for index, example in enumerate(dict.fromkeys(table["id"]))}
    ids, checkpoint = list(place), table["checkpoint"]
    n, c = len(ids), int(checkpoint.max(initial=-1)) + 1  # 0 checkpoints of a file without lines
    cell = np.asarray([place[example] for example in table["id"]], dtype=np.int64) * c + checkpoint
    order = np.argsort(cell)  # cell n * C + c, each once, whatever the order of the lines
    whole = 0 < n * c == len(cell) and checkpoint.min() >= 0 and np.array_equal(cell[order], np.arange(n * c))
    _require(path, whole, "it holds no example, or not one line for each example and checkpoint 0, 1, 2, ...")
    grid: dict[str, Any] = {
        name: table[name][order].reshape(n, c) for name in (*names[2:], *optional) if table[name] is not None
    }
    n_tokens, step = grid["n_tokens"], grid["step"]
    dynamics = TrainingDynamics(
        ids,
        step[0],
        np.where(n_tokens > 0, grid["nll_sum"], 0.0),
        n_tokens[:, 0],
        grid["n_correct"],
        alone_nll_sum=grid.get("alone_nll_sum"),
    )
    of_tokens = [name for name in OF_TOKENS if name in grid]
    lengths = np.vectorize(len, otypes=[int])  # [N, C] of arrays -> i64[N, C]
    problems = [
        ("n_tokens", n_tokens != n_tokens[:, :1], "one number for all checkpoints"),
        ("step", step != step[:1], "one number for each checkpoint"),
        *impossible_numbers(dynamics),
        *((name, lengths(grid[name]) != n_tokens, "n_tokens numbers") for name in of_tokens),
    ]
    for name, wrong, allowed in problems:
        first = ids[int(wrong.any(axis=1).argmax())]
        _require(path, not wrong.any(), f"{name} of example {first!r} is wrong; allowed: {allowed}")
    joined: dict[str, Any] = {name: [np.stack(list(line)) for line in grid[name]] for name in of_tokens}
    if "state" in grid:
        states = list(grid["state"][:, -1])  # of the last checkpoint, the others are empty
        _require(path, len({*map(len, states)}) == 1, "the states of its examples have several sizes")
        joined["states"] = np.stack(states).astype(np.float16)
    return replace(dynamics, **joined)
