"""Tokenised examples behind a memory map, made by `encode` or read from the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sftmix.common.errors import ConfigError, DataError
from sftmix.data.conversations import EXAMPLE, Conversations, content_hash, example_of
from sftmix.data.report import DataReport
from sftmix.data.rows import Prepared, prepare
from sftmix.data.store import get_or_build, key_of, open_rows, rows_of, write_rows
from sftmix.data.templates import Encoder
from sftmix.data.text import encode_windows, first_windows
from sftmix.data.tokenise import Tokenise, tokenised
from sftmix.options import DataOptions
from sftmix.types import Encoded, Example, Int64

TEMPLATE_REASONS = ("template_refused", "prefix_mismatch", "no_end_of_turn")
MAX_TEMPLATE_LOSS = 0.05
"""Largest share of the training examples that a template may fail to encode."""

SCHEMA = pa.schema(
    [
        *EXAMPLE,
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("truncated", pa.bool_()),
        ("n_targets", pa.int32()),
        ("offset", pa.int64()),
        ("starts", pa.list_(pa.int32())),
    ]
)
"""Windows of plain text have the source, label and columns of their first document; `offset` is the window's place
among its tokens, and `starts` are the places where the documents begin. Elsewhere both are null."""


class EncodedDataset(Sequence[Encoded]):
    """N tokenised examples in file order; `dataset[row]` reads one of them from the Arrow file.

    fingerprint  hash of the rows' content, the tokenizer, the template, the length and the code version. Artefacts
                 made from this data set carry it, and are refused beside another data set.
    is_text      they are windows of plain text
    """

    def __init__(self, path: Path, fingerprint: str, is_text: bool) -> None:
        self._table, self.fingerprint, self.is_text = open_rows(path), fingerprint, is_text

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: Any) -> Any:
        """The Encoded of one row (negative rows count from the end), or a list of them for a slice."""
        number: Any = range(len(self))[row]
        if isinstance(row, slice):
            return [self[i] for i in number]
        ids = self._numbers(number, "input_ids")
        name, truncated, weights = (self._table[column][number].as_py() for column in ("id", "truncated", "weights"))
        target = np.zeros(len(ids), dtype=np.bool_)
        weight = None if weights is None else np.ones(len(ids), dtype=np.float32)
        for span, (start, end) in enumerate(self._numbers(number, "spans").reshape(-1, 2)):
            target[start:end] = True
            if weight is not None:
                weight[start:end] = weights[span]
        starts = self._numbers(number, "starts") if self.is_text else None
        return Encoded(number, name, ids, target, truncated, starts, weight)

    def _numbers(self, row: int, column: str) -> Int64:
        return self._table[column][row].values.to_numpy().astype(np.int64)

    @cached_property
    def ids(self) -> list[str]:
        """N example ids."""
        return self._table["id"].to_pylist()

    @cached_property
    def lengths(self) -> Int64:
        """i64[N], tokens per example."""
        return pc.list_value_length(self._table["input_ids"]).to_numpy().astype(np.int64)

    @cached_property
    def n_targets(self) -> Int64:
        """i64[N], response tokens per example, end-of-turn token included."""
        return self._table["n_targets"].to_numpy().astype(np.int64)

    @cached_property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """bool[N], True where the example was cut at the maximum length."""
        return self._table["truncated"].to_numpy()

    @cached_property
    def labels(self) -> list[str | None] | None:
        """N labels (data.label_field), or None when no example has one."""
        labels = self._table["label"].to_pylist()
        return labels if any(label is not None for label in labels) else None

    @cached_property
    def sources(self) -> list[str]:
        """N places of the rows, such as `file:line`; of a window of text that of its first document."""
        return self._table["source"].to_pylist()

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The rows' other scalar fields: name -> N values, None where a row lacks the field."""
        if self.packed:
            return {}  # a window may hold documents with different values
        rows = [json.loads(text) for text in self._table["columns"].to_pylist()]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    @cached_property
    def packed(self) -> bool:
        """True if some example holds several documents, which must not attend to each other."""
        return self.is_text and pc.max(pc.list_value_length(self._table["starts"])).as_py() > 1

    def example(self, row: int) -> Example:
        """Read the text of one row: its messages, source, label and columns."""
        return next(self._examples(np.array([row])))

    def examples(self) -> Iterator[Example]:
        """Read the text of all rows, in file order."""
        return self._examples(np.arange(len(self)))

    def _examples(self, rows: Int64) -> Iterator[Example]:
        for row in rows_of(self._table.select([*dict(EXAMPLE), "offset"]), rows):
            example = example_of(row)
            if self.is_text:
                example = replace(example, source=f"{example.source}, from token {row['offset']}")
            yield replace(example, columns={}) if self.packed else example

    def content_hashes(self) -> list[str]:
        """Return the hash of each row's turns, 16 hex digits, in file order; rows of the same text have the same."""
        return [content_hash(example.messages) for example in self.examples()]


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Both sides, tokenised, and the report on all rows."""

    train: EncodedDataset
    eval: EncodedDataset | None
    report: DataReport


def load_data(
    options: DataOptions, encoder: Encoder, *, max_length: int, seed: int, progress: bool = True
) -> LoadedData:
    """Call `prepare`, then `encode`."""
    return encode(prepare(options, seed, progress=progress), encoder, max_length=max_length, progress=progress)


def encode(
    prepared: Prepared,
    encoder: Encoder,
    *,
    max_length: int,
    keep: Sequence[str] | None = None,
    length_option: str = "data.max_length",
    progress: bool = True,
) -> LoadedData:
    """Tokenise both sides, or read them from the cache.

    max_length     tokens per example; longer ones are cut at the end, and dropped if no response token is left
    keep           None, or the ids of the training examples to keep; a weaker reference trains on no example that the
                   target leaves out
    length_option  name of the option that set max_length, for messages
    Raises DataError if a side has no example left, or if the template fails for too many.
    """
    if max_length < 2:
        raise ConfigError(f"data.max_length must be at least 2 (a prompt token and a response token), not {max_length}")
    options, is_text = prepared.options, prepared.text
    whole, packed = options.multi_turn == "whole", options.packing is not False

    def side(option: str, rows: Conversations, keep: Sequence[str] | None, limit: int | None) -> EncodedDataset:
        """Tokenise one side, and add its report to those of the other."""
        selected = None if keep is None else frozenset(keep)
        cut = "as kept" if whole and selected is not None else whole  # not by this template alone
        settings = [encoder.fingerprint, max_length, cut, None if selected is None else key_of(sorted(selected))]
        settings += [packed, limit] if is_text else []

        def build(directory: Path) -> dict[str, Any]:
            report = DataReport(max_length=max_length)
            if is_text:
                windows = encode_windows(encoder, rows, max_length, packed, report, progress)
                stored = first_windows(
                    (row for row in windows if selected is None or row["id"] in selected), limit, report
                )
            else:
                work = Tokenise(rows, whole, encoder, max_length, selected)
                stored = tokenised(work, rows.records, report, processes=options.num_proc, progress=progress)
            report.train = write_rows(directory / "tokens.arrow", SCHEMA, stored)
            _check_losses(
                report, encoder, f"{option}: no example is left with {length_option} = {max_length}", selected
            )
            return report.to_dict()

        key = key_of("tokens", rows.cache_key, settings)
        directory, summary = get_or_build(options.cache_dir, f"tokens-{key}", build)
        reports.append(DataReport(**summary))
        return EncodedDataset(directory / "tokens.arrow", key_of("tokens", rows.fingerprint, settings), is_text)

    reports: list[DataReport] = []
    train = side("data.train", prepared.train, keep, options.limit)
    lost = sum(reports[0].counts.get(reason, 0) for reason in TEMPLATE_REASONS)
    if lost > MAX_TEMPLATE_LOSS * (lost + len(train)) and not options.skip_bad:
        raise DataError(
            f"data.template: {encoder.name} cannot encode {lost:,} of {lost + len(train):,} training examples; "
            "choose another template, or let data.skip_bad drop them:\n" + "\n".join(reports[0].lines()[1:])
        )
    held_out = None if prepared.eval is None else side("data.eval", prepared.eval, None, None)
    report = deepcopy(prepared.report)
    for more in reports:
        report.take(more)
    report.train, report.eval, report.max_length = len(train), len(held_out or ()), max_length
    if is_text:
        report.tokens = int(train.lengths.sum()), 0 if held_out is None else int(held_out.lengths.sum())
    report.notes = [*encoder.notices, *report.notes]
    return LoadedData(train, held_out, report)


def _check_losses(report: DataReport, encoder: Encoder, nothing: str, selected: frozenset[str] | None) -> None:
    """Raise DataError if no example is left (`nothing` says so), or if a reference splits too many conversations."""
    lost = report.counts.get("split_alone", 0)
    if selected is not None and lost > MAX_TEMPLATE_LOSS * len(selected):
        raise DataError(
            f"data.multi_turn whole: the template of the reference ({encoder.name}) splits {lost:,} of "
            f"{len(selected):,} conversations that the target reads whole (first: "
            f"{', '.join(report.first['split_alone'])}), and scores of turns are none of the conversation; set "
            "data.multi_turn to per_turn, under which all templates give the same examples, or give the reference a "
            "template that keeps earlier turns as they are"
        )
    if not report.train:
        raise DataError("\n".join([f"{nothing}:", *report.lines()[1:]]))
