"""Tokenised examples behind a memory map, made by `encode_dataset` or read from the cache."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sftmix.data.report import DataReport
from sftmix.data.store import (
    EXAMPLE,
    Conversations,
    Prepared,
    content_hash,
    example_of,
    open_rows,
    rows_of,
    write_rows,
)
from sftmix.data.tokenise import case_of, tokenise, with_room
from sftmix.disk.cache import Record, get_or_build, key_of
from sftmix.disk.hashes import sha256_json
from sftmix.text.encoder import Encoder
from sftmix.text.examples import examples_of
from sftmix.text.mask import LOST
from sftmix.types import Encoded, Example, Int64
from sftmix.words.errors import DataError
from sftmix.words.fields import TEXT
from sftmix.words.progress import progress_bar

TEMPLATE_REASONS = (*LOST, "no_end_of_turn", "split_alone")
MAX_TEMPLATE_LOSS = 0.05
"""Largest share of the training examples that a template may fail to encode."""

_NUMBERS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        *EXAMPLE,
        ("input_ids", _NUMBERS),
        ("spans", _NUMBERS),
        ("weights", pa.list_(pa.float32())),
        ("truncated", pa.bool_()),
        ("n_targets", pa.int32()),
        ("starts", _NUMBERS),
    ]
)
"""Windows have `starts`, the places where what they hold begins, which is null in other rows."""

MAX_CUT = 0.05
"""Largest share of the training examples that may be cut without a warning."""


class EncodedDataset(Sequence[Encoded]):
    """N tokenised examples in file order; `dataset[row]` reads one of them from the Arrow file.

    fingerprint  hash of the examples, as text and as ids, of the tokenizer, the renderer and the length. Artefacts
                 made from this data set carry it, and are refused beside another data set.
    ids          N example ids
    lengths      i64[N], tokens per example
    n_targets    i64[N], response tokens per example, end-of-turn token included
    truncated    bool[N], True if the example was cut at the maximum length
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._table, self.fingerprint = open_rows(path), fingerprint
        self.ids = self._table["id"].to_pylist()
        self.lengths = pc.list_value_length(self._table["input_ids"]).to_numpy().astype(np.int64)
        self.n_targets = self._table["n_targets"].to_numpy().astype(np.int64)
        self.truncated = self._table["truncated"].to_numpy()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: Any) -> Any:
        """The Encoded of one row; negative rows count from the end."""
        number = range(len(self))[row]  # with the IndexError that ends a loop over a sequence
        ids = self._numbers(number, "input_ids")
        weights = self._table["weights"][number].as_py()
        target = np.zeros(len(ids), dtype=np.bool_)  # [length]; spans: [3, 7, 9, 12] -> 3 to 6 and 9 to 11
        weight = None if weights is None else np.ones(len(ids), dtype=np.float32)
        for span, (start, end) in enumerate(self._numbers(number, "spans").reshape(-1, 2)):
            target[start:end] = True
            if weight is not None:
                weight[start:end] = weights[span]
        starts = self._numbers(number, "starts") if self._table["starts"][number].is_valid else None
        return Encoded(number, self.ids[number], ids, target, bool(self.truncated[number]), starts, weight)

    def _numbers(self, row: int, column: str) -> Int64:
        return self._table[column][row].values.to_numpy().astype(np.int64)

    @cached_property
    def labels(self) -> list[str | None] | None:
        """N labels (data.label_field), or None when no example has one."""
        labels = self._table["label"]
        return None if labels.null_count == len(labels) else labels.to_pylist()

    @cached_property
    def sources(self) -> list[str]:
        """N places of the rows, such as `file:line`; a window has the place of what is first in it."""
        return self._table["source"].to_pylist()

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The rows' other scalar fields: name -> N values, None if a row lacks the field."""
        if self.packed:
            return {}  # a window may hold documents with different values
        rows = [json.loads(text) for text in self._table["columns"].to_pylist()]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    @cached_property
    def highest_id(self) -> int:
        """The greatest token id of all rows."""
        return pc.max(pc.list_flatten(self._table["input_ids"])).as_py()  # for the check against the embedding

    @cached_property
    def packed(self) -> bool:
        """True if some example holds several documents, which must not attend to each other."""
        return (pc.max(pc.list_value_length(self._table["starts"])).as_py() or 0) > 1  # None: no row has any

    def example(self, row: int) -> Example:
        """Read the text of one row: its messages, source, label and columns."""
        return next(self.examples(slice(row, row + 1)))

    def examples(self, rows: Int64 | slice = slice(None)) -> Iterator[Example]:
        """Read the text of these rows; by default of all, in file order."""
        # Without the token columns, which are most of the file.
        for row in rows_of(self._table.select([*dict(EXAMPLE)]), np.arange(len(self))[rows]):
            yield replace(example_of(row), columns={}) if self.packed else example_of(row)

    def content_hashes(self) -> list[str]:
        """Return the hash of each row's turns, 16 hex digits, in file order; rows of the same text have the same."""
        return [content_hash(example.messages) for example in self.examples()]


class LoadedData(NamedTuple):
    """Both sides, tokenised, and the report on all rows."""

    train: EncodedDataset
    eval: EncodedDataset | None
    report: DataReport


def encode_dataset(
    prepared: Prepared,
    encoder: Encoder,
    *,
    max_length: int,
    keep: Sequence[str] | None = None,
) -> LoadedData:
    """Tokenise both sides, or read them from the cache.

    max_length  tokens per example; longer ones are cut at the end, and dropped if no response token is left
    keep        None, or the ids of the training examples to keep; a weaker reference trains on no example that the
                target leaves out
    Raises DataError if a side has no example left, or if the template fails for too many.
    """
    job = _Encoding(prepared, encoder, max_length)
    report = DataReport(notes=list(encoder.notices), max_length=max_length)
    report.take(prepared.report)
    is_text = prepared.options.format == TEXT
    train, found = job.side(prepared.train, limit=prepared.options.limit if is_text else None, keep=keep)
    report.take(found)
    if (cut := found.counts.get("truncated", 0)) > MAX_CUT * len(train):
        report.notes.append(
            f"warning: {cut / len(train):.0%} of the training examples are cut at data.max_length = {max_length}, and "
            "trained without their end: raise data.max_length, or leave such rows out"
        )
    job.refuse_losses(found)
    held_out = None
    if prepared.eval is not None:
        held_out, found = job.side(prepared.eval)
        report.take(found)
        _refuse_nothing("data.eval", found)
    report.train, report.eval = len(train), len(held_out or ())
    if is_text:
        report.tokens = int(train.lengths.sum()), 0 if held_out is None else int(held_out.lengths.sum())
    return LoadedData(train, held_out, report)


class _Encoding(NamedTuple):
    """What both sides are tokenised with."""

    prepared: Prepared
    encoder: Encoder
    max_length: int

    def side(
        self, rows: Conversations, *, limit: int | None = None, keep: Sequence[str] | None = None
    ) -> tuple[EncodedDataset, DataReport]:
        """Return one side, tokenised or from the cache, and the report on it alone.

        limit  most windows of a renderer that makes some
        """
        selected = None if keep is None else frozenset(keep)
        key = key_of(
            rows=rows.key,
            encoder=self.encoder.fingerprint,
            max_length=self.max_length,
            multi_turn=self.prepared.options.multi_turn,
            selected=None if keep is None else sha256_json(sorted(keep)),
            limit=limit,
        )
        directory, summary = get_or_build(
            self.prepared.options.cache_dir,
            f"tokens-{key}",
            lambda place: self._build(place, rows, limit, selected),
        )
        fingerprint = sha256_json([summary.pop("content"), self.encoder.fingerprint, self.max_length])[:32]
        return EncodedDataset(directory / "tokens.arrow", fingerprint), DataReport(**summary)

    def _build(
        self, directory: Path, rows: Conversations, limit: int | None, selected: frozenset[str] | None
    ) -> Record:
        """Write the tokens of one side; return its report for the cache, with the hash of its content."""
        report, content = DataReport(max_length=self.max_length), sha256()
        renderer = self.encoder.renderer

        def kept() -> Iterator[Record]:
            """Yield the rows to store; the places of the rows, which may move, are not among their content."""
            for row in tokenise(examples, renderer, self.max_length, report, splits=before is None):
                if selected is None or row["id"] in selected:
                    content.update(sha256_json({**row, "source": None}).encode())
                    yield row

        with progress_bar("Tokenising", total=len(rows.records), unit=" rows", delay=1) as bar:
            # A window is selected by its own id, which no example in it has.
            before = None if renderer.packs else selected
            examples = self._examples(rows, before, report, bar)
            report.train = write_rows(directory / "tokens.arrow", SCHEMA, itertools.islice(kept(), limit))
        if report.train == limit:
            report.notes.append(f"no more than the first {limit:,} training windows are used (data.limit)")
        return report.to_dict() | {"content": content.hexdigest()}

    def _examples(
        self, rows: Conversations, selected: frozenset[str] | None, report: DataReport, bar: Any
    ) -> Iterator[Example]:
        """Yield the examples of rows that are selected and may have a response within the maximum length.

        They also decide which conversations are one example, so that a reference has the examples of the target.
        """
        whole = self.prepared.options.multi_turn == "whole"
        for row in rows.read():
            bar.update()
            # The target has trained c1 as one example, or its turns apart: then the ids are c1@turn0, c1@turn1.
            found = examples_of(row, whole=whole and (selected is None or row.id in selected))
            chosen = [example for example in found if selected is None or example.id in selected]
            count = with_room(self.encoder.renderer, chosen, self.max_length)
            yield from chosen[:count]
            for example in chosen[count:]:
                report.add("no_response_token", case_of(example))

    def refuse_losses(self, found: DataReport) -> None:
        """Raise DataError if the template fails for too many training examples."""
        lines = "\n".join(found.lines()[1:])
        lost = sum(found.counts.get(reason, 0) for reason in TEMPLATE_REASONS)
        if lost > MAX_TEMPLATE_LOSS * (lost + found.train) and not self.prepared.options.skip_bad:
            raise DataError(
                f"data.template, renderer: {self.encoder.name} cannot encode {lost:,} of {lost + found.train:,} "
                f"training examples; choose another, or let data.skip_bad drop them:\n{lines}"
            )
        _refuse_nothing("data.train", found)


def _refuse_nothing(option: str, found: DataReport) -> None:
    if not found.train:
        lines = "\n".join(found.lines()[1:])
        raise DataError(f"{option}: no example is left:\n{lines}")


class Texts(Sequence[tuple[str, str]]):
    """Instruction and response of each example of a data set, read when they are asked for."""

    def __init__(self, data: EncodedDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: Any) -> Any:
        return instruction_and_response(self._data.example(range(len(self))[row]))


def instruction_and_response(example: Example) -> tuple[str, str]:
    """Return instruction and response: all turns before the last (with their roles if there are several), the last."""
    *before, last = example.messages
    if len(before) == 1 and before[0].role == "user":
        return before[0].content, last.content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in before), last.content
