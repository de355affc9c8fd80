"""Documents -> windows of tokens. Every token is a target but the first of each document in a window.

A document ends with eos, and begins with BOS if the tokenizer writes one before plain text. Packed documents stand one
after the other and are cut into windows of exactly max_length tokens. A window names the places where its documents
begin: neither attention nor targets may cross them, or the model would learn from an unrelated text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sftmix.common.errors import DataError
from sftmix.common.progress import progress_bar
from sftmix.data.conversations import WHOLE
from sftmix.data.documents import Documents
from sftmix.data.report import HELD_OUT_BEFORE, DataReport
from sftmix.data.templates import Encoder, writes_bos
from sftmix.types import Int64

STRETCH = 1 << 18
"""Characters tokenised in one call."""

MARGIN = 4096
"""Characters before and behind a cut that are tokenised on both sides of it."""

_SAME = 32
"""Tokens before a cut that both sides must agree on."""


class Part(NamedTuple):
    """The characters [start, end) of a document: all of it, or the part of one side."""

    record: int
    start: int
    end: int


@dataclass(slots=True)
class Window:
    """Tokens of one example.

    input_ids  the tokens
    starts     places where the documents (or pieces of documents) begin
    records    the documents
    offset     place of the first token among the tokens of its document
    """

    input_ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    offset: int = 0

    @property
    def spans(self) -> Int64:
        """i64[S, 2], [start, end) of the targets: nothing predicts the first token of a document in a window."""
        bounds = np.asarray([*self.starts, len(self.input_ids)], dtype=np.int64)
        spans = np.stack([bounds[:-1] + 1, bounds[1:]], axis=1)
        return spans[spans[:, 0] < spans[:, 1]]

    def content_hash(self) -> str:
        """Hash of the tokens and of the places where documents begin, 16 hex digits.

        Another length, tokenizer or order of documents gives other hashes, so artefacts of different windows never mix.
        """
        digest = hashlib.blake2b(digest_size=8)
        for numbers in (self.input_ids, self.starts):
            digest.update(np.asarray([len(numbers), *numbers], dtype="<i8").tobytes())
        return digest.hexdigest()


def windows(tokens: Iterable[tuple[int, int, Sequence[int]]], length: int, *, packed: bool) -> Iterator[Window]:
    """Cut the tokens of documents into windows of `length`.

    tokens  (record, place of the first token in its document, token ids), document after document; a document may come
            in several stretches
    packed  a window may hold several documents; else a document ends its window
    """
    window = Window()
    for record, place, ids in tokens:
        if place == 0 and window.input_ids and not packed:
            yield window
            window = Window()
        done = 0
        while done < len(ids):
            if not window.input_ids:
                window.offset = place + done
            if place + done == 0 or not window.input_ids:
                window.starts.append(len(window.input_ids))
                window.records.append(record)
            taken = ids[done : done + length - len(window.input_ids)]
            window.input_ids.extend(taken)
            done += len(taken)
            if len(window.input_ids) == length:
                yield window
                window = Window()
    if window.input_ids:
        yield window


# ------------------------------------------------------------------------------------------- tokenisation


def document_tokens(
    encoder: Encoder, side: Documents, report: DataReport, *, progress: bool = False
) -> Iterator[tuple[int, int, list[int]]]:
    """Tokenise the documents into (record, place of the first token, ids); long ones come in several stretches.

    BOS stands before the first character of a document and eos behind its last; a part in the middle has neither. The
    report counts the documents that spell special tokens.
    """
    bos = [int(encoder.tokenizer.bos_token_id)] if writes_bos(encoder.tokenizer) else []
    parts = [Part(record, *part) for record, part in zip(side.records.tolist(), side.parts.tolist(), strict=True)]
    total = sum(part.end - part.start for part in parts)
    with progress_bar("Tokenising", total=total, unit="B", unit_scale=True, delay=1, enabled=progress) as bar:
        for batch in _batches(parts):
            spelt: list[set[str]] = [set() for _ in batch]
            texts = [_noted(encoder, side.text(*part), into) for part, into in zip(batch, spelt, strict=True)]
            names = [side.source(part.record) for part in batch]
            for part, found in zip(batch, _stretches_of(encoder, names, texts), strict=True):
                place = 0
                begin = bos if part.start == 0 else []
                end = [encoder.end_of_turn_id] if part.end == side.characters(part.record) else []
                for ids in itertools.chain([begin], found, [end]):
                    if ids:
                        yield part.record, place, ids
                        place += len(ids)
                bar.update(part.end - part.start)
            for name, there in zip(names, spelt, strict=True):
                if there:
                    report.add("spelt_in_document", name, sorted(there))


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Group the parts that are tokenised in one call: at most STRETCH characters together; a longer part is alone."""
    batch: list[Part] = []
    total = 0
    for part in parts:
        if batch and total + part.end - part.start > STRETCH:
            yield batch
            batch, total = [], 0
        batch.append(part)
        total += part.end - part.start
    if batch:
        yield batch


def _noted(encoder: Encoder, pieces: Iterable[str], spelt: set[str]) -> Iterator[str]:
    """Yield the pieces of a text as they are; add to `spelt` the spellings of special tokens in it."""
    before = ""
    for piece in pieces:
        spelt.update(encoder.special_in([before + piece]))
        before = piece[-MARGIN:]
        yield piece


def _stretches_of(
    encoder: Encoder, names: Sequence[str], texts: Sequence[Iterable[str]]
) -> Iterable[Iterable[list[int]]]:
    """Tokenise each text, given in pieces, in one stretch; a text that is alone may be long and takes several."""
    if len(texts) == 1:
        return [stretches(encoder, texts[0], name=names[0])]
    return [[ids] for ids in encoder.tokenize([encoder.content("".join(pieces)) for pieces in texts])]


def stretches(encoder: Encoder, pieces: Iterable[str], *, size: int = STRETCH, name: str = "") -> Iterator[list[int]]:
    """Tokenise one text, a stretch at a time; together the ids are those of the text tokenised in one call.

    A stretch ends behind a newline, at a boundary between tokens. The next one is tokenised from some thousand
    characters earlier, and the cut is used only if both give the same tokens around it. A tokenizer that does not give
    the places of its tokens in the text tokenises the text in one call.

    name  of the text, for messages
    Raises DataError if the tokens of a stretch change with the text that follows.
    """
    text, done, wanted = "", 0, size
    known: list[int] = []
    for piece in pieces:
        text += piece
        if len(text) < wanted or not encoder.tokenizer.is_fast:
            continue
        ids, places = _placed(encoder, text)
        first = _first(ids, places, done, known, name)
        cut, start = _cut(encoder, text, ids, places, done)
        if cut is None:  # more text is needed
            wanted = 2 * len(text)
            continue
        at = int(np.searchsorted(places, cut))
        yield ids[first:at]
        known = ids[max(0, at - _SAME) : at]
        text, done = text[start:], cut - start
        wanted = len(text) + size
    if done == 0:
        yield encoder.tokenize([encoder.content(text)])[0]
    else:
        ids, places = _placed(encoder, text)
        yield ids[_first(ids, places, done, known, name) :]


def _placed(encoder: Encoder, text: str) -> tuple[list[int], Int64]:
    """Tokenise a text; return the ids and the character at which each begins, i64."""
    ids, begins = encoder.tokenize_content(text)
    return ids, np.maximum.accumulate(np.asarray(begins, dtype=np.int64))


def _first(ids: list[int], places: Int64, done: int, known: list[int], name: str) -> int:
    """Find the first token that was not yielded yet; the tokens before it must be the last that were (`known`)."""
    first = int(np.searchsorted(places, done))
    known = known[max(0, len(known) - first) :]  # long tokens: the margin may have fewer than were kept
    if done and (first == len(ids) or places[first] != done or ids[first - len(known) : first] != known):
        raise DataError(
            f"{name}: the tokenizer reads this text differently when it goes on; cut it into smaller documents"
        )
    return first


def _cut(encoder: Encoder, text: str, ids: list[int], places: Int64, done: int) -> tuple[int | None, int]:
    """Find the cut, a character behind a newline at which a token begins, and the start of the next stretch.

    The cut is None if there is none where both stretches agree.
    """
    cut = len(text) - MARGIN
    for _ in range(8):
        cut = text.rfind("\n", done, cut) + 1
        at = int(np.searchsorted(places, cut))
        if cut <= done + MARGIN or at == len(ids):
            return None, 0
        start = text.rfind("\n", 0, cut - MARGIN) + 1
        if places[at] == cut and start:
            again, there = _placed(encoder, text[start:])
            same = int(np.searchsorted(there, cut - start))
            if again[same:] == ids[at:] and again[max(0, same - _SAME) : same] == ids[at - min(_SAME, same) : at]:
                return cut, start
        cut -= 1
    return None, 0


# --------------------------------------------------------------------------------------- what is stored


def encode_windows(
    encoder: Encoder, side: Documents, length: int, packed: bool, report: DataReport, progress: bool
) -> Iterator[dict[str, Any]]:
    """Make the windows of one side, as `sftmix.data.dataset` stores them; count those without a target."""
    seen: Counter[str] = Counter()
    for window in windows(document_tokens(encoder, side, report, progress=progress), length, packed=packed):
        spans = window.spans
        if not len(spans):
            report.add("no_target", f"{side.source(window.records[0])}, token {window.offset}")
            continue
        name = window.content_hash()
        repeats = seen[name]
        seen[name] += 1
        yield {
            "id": f"{name}#{repeats}" if repeats else name,
            "input_ids": np.asarray(window.input_ids, dtype=np.int32),
            "spans": spans.reshape(-1).astype(np.int32),
            "truncated": False,
            "n_targets": len(window.input_ids) - len(window.starts),
            "record": window.records[0],
            "turn": WHOLE,
            "text": encoder.decode(window.input_ids),
            "offset": window.offset,
            "starts": window.starts,
            "records": window.records,
        }


def first_windows(
    rows: Iterator[dict[str, Any]], limit: int | None, divided: bool, report: DataReport
) -> Iterator[dict[str, Any]]:
    """Take the first `limit` windows; a note in the report says that there were more.

    divided  held-out text was taken out of the documents before
    """
    yield from itertools.islice(rows, limit)
    if limit is not None and next(rows, None) is not None:
        note = f"the first {limit:,} training windows are used, the rest left out (data.limit)"
        report.notes.append(f"{note}; {HELD_OUT_BEFORE}" if divided else note)
