"""Documents -> windows of tokens, every token but the first of each document in a window a target.

A document is its tokens, with BOS before where the tokenizer writes one to plain text and eos behind. Packed, documents
stand one after the other and are cut into windows of exactly max_length tokens; a window says where each of its
documents begins, and neither attention nor targets go across (T12).
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sftmix.common.errors import DataError
from sftmix.common.progress import progress_bar
from sftmix.data.conversations import WHOLE
from sftmix.data.documents import Documents
from sftmix.data.report import DataReport
from sftmix.data.sides import Selection
from sftmix.data.templates import Encoder, writes_bos
from sftmix.types import Rows

STRETCH = 1 << 18
"""Characters tokenised in one call."""

MARGIN = 4096
"""Characters before and behind a cut that are tokenised on both sides of it."""

_SAME = 32
"""Tokens before a cut that both sides must agree on."""


@dataclass(frozen=True, slots=True)
class Part:
    """The characters [start, end) of a document; all of it, or one side of the held-out cut."""

    record: int
    start: int
    end: int


@dataclass(slots=True)
class Window:
    """Tokens of one example.

    input_ids  the tokens
    starts     where each document (or piece of one) begins
    records    the document of each
    offset     place of the first token among the tokens of its document
    """

    input_ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    offset: int = 0

    @property
    def spans(self) -> Rows:
        """i64[S, 2], [start, end) of the targets: nothing predicts the first token of a document in a window."""
        bounds = np.asarray([*self.starts, len(self.input_ids)], dtype=np.int64)
        spans = np.stack([bounds[:-1] + 1, bounds[1:]], axis=1)
        return spans[spans[:, 0] < spans[:, 1]]


class WindowIds:
    """Ids of windows: 16 hex digits of a hash of the tokens and of where documents begin, `#k` for the k-th repeat.

    Another length, tokenizer or order of documents gives other windows, so artefacts of one never join the other's.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def of(self, window: Window) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for numbers in (window.input_ids, window.starts):
            digest.update(np.asarray([len(numbers), *numbers], dtype="<i8").tobytes())
        name = digest.hexdigest()
        count = self._seen[name]
        self._seen[name] += 1
        return f"{name}#{count}" if count else name


def windows(tokens: Iterable[tuple[int, int, Sequence[int]]], length: int, *, packed: bool) -> Iterator[Window]:
    """Cut the tokens of documents into windows of `length`.

    tokens  (record, place of the first token in its document, token ids), document after document, in any number of
            stretches each
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
    encoder: Encoder, documents: Documents, parts: Iterable[Part], *, size: int = STRETCH
) -> Iterator[tuple[int, int, list[int]]]:
    """(record, place of the first token, ids) of the documents, long ones in several stretches.

    BOS stands before the first character of a document and eos behind its last, so a part has them only at those ends.
    """
    bos = [int(encoder.tokenizer.bos_token_id)] if writes_bos(encoder.tokenizer) else []
    for batch in _batches(parts, size):
        short = len(batch) > 1
        texts = ["".join(documents.text(p.record, p.start, p.end)) for p in batch] if short else []
        found: Iterable[Iterable[list[int]]] = [[ids] for ids in encoder.tokenize(texts)]
        if not short:
            pieces = documents.text(batch[0].record, batch[0].start, batch[0].end)
            found = [stretches(encoder, pieces, size=size, name=documents.source(batch[0].record))]
        for part, parts_of_it in zip(batch, found, strict=True):
            yield from _with_ends(part, parts_of_it, bos, [encoder.end_of_turn_id], documents)


def _batches(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """Parts that are tokenised in one call: at most `size` characters together; a longer one comes alone."""
    batch: list[Part] = []
    total = 0
    for part in parts:
        if batch and total + part.end - part.start > size:
            yield batch
            batch, total = [], 0
        batch.append(part)
        total += part.end - part.start
    if batch:
        yield batch


def _with_ends(
    part: Part, found: Iterable[list[int]], bos: list[int], eos: list[int], documents: Documents
) -> Iterator[tuple[int, int, list[int]]]:
    place = 0
    if part.start == 0 and bos:
        yield part.record, 0, bos
        place = 1
    for ids in found:
        if ids:
            yield part.record, place, ids
            place += len(ids)
    if part.end == documents.characters(part.record):
        yield part.record, place, eos


def stretches(encoder: Encoder, pieces: Iterable[str], *, size: int = STRETCH, name: str = "") -> Iterator[list[int]]:
    """Token ids of one text, a stretch at a time; together they are those of the text tokenised in one call.

    A stretch ends beside a newline, at a boundary between tokens. The next one is tokenised from some thousand
    characters earlier on, and the cut is used only if both tokenise its surroundings alike. A tokenizer that does not
    say where its tokens stand in the text tokenises it in one call. `name` is for the message where that fails.
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
        if cut is None:  # no newline, or none where both sides agree: more text is needed
            wanted = 2 * len(text)
            continue
        at = int(np.searchsorted(places, cut))
        yield ids[first:at]
        known = ids[max(0, at - _SAME) : at]
        text, done = text[start:], cut - start
        wanted = len(text) + size
    if done == 0:
        yield encoder.tokenize([text])[0]
    else:
        ids, places = _placed(encoder, text)
        yield ids[_first(ids, places, done, known, name) :]


def _placed(encoder: Encoder, text: str) -> tuple[list[int], Rows]:
    """Token ids of a text and the character at which each begins, i64."""
    encoded = encoder.tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    places = np.fromiter((start for start, _ in encoded["offset_mapping"]), dtype=np.int64)
    return encoded["input_ids"], np.maximum.accumulate(places)


def _first(ids: list[int], places: Rows, done: int, known: list[int], name: str) -> int:
    """Index of the first token that was not handed out yet; what stands before it must be what was."""
    first = int(np.searchsorted(places, done))
    if done and (first == len(ids) or places[first] != done or ids[first - len(known) : first] != known):
        raise DataError(
            f"{name}: the tokenizer reads this text differently when it goes on; cut it into smaller documents"
        )
    return first


def _cut(encoder: Encoder, text: str, ids: list[int], places: Rows, done: int) -> tuple[int | None, int]:
    """(character at which a token begins behind a newline, character from which the next stretch is tokenised)."""
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
    encoder: Encoder, side: Selection, length: int, packed: bool, report: DataReport, progress: bool
) -> Iterator[dict[str, Any]]:
    """The windows of one side, as `sftmix.data.dataset` stores them; those without a target are counted, not given."""
    documents, extents = side.conversations, side.extents
    assert isinstance(documents, Documents)
    assert extents is not None
    parts = [Part(record, *extent) for record, extent in zip(side.records.tolist(), extents.tolist(), strict=True)]
    ids = WindowIds()
    total = sum(part.end - part.start for part in parts)
    with progress_bar("Tokenising", total=total, unit="B", unit_scale=True, delay=1, enabled=progress) as bar:
        tokens = document_tokens(encoder, documents, _counted(parts, bar.update))
        for window in windows(tokens, length, packed=packed):
            spans = window.spans
            if not len(spans):
                report.add("no_target", f"{documents.source(window.records[0])}, token {window.offset}")
                continue
            yield {
                "id": ids.of(window),
                "input_ids": np.asarray(window.input_ids, dtype=np.int32),
                "spans": spans.reshape(-1).astype(np.int32),
                "truncated": False,
                "n_targets": len(window.input_ids) - len(window.starts),
                "record": window.records[0],
                "turn": WHOLE,
                "text": _decoded(encoder, window.input_ids),
                "offset": window.offset,
                "starts": window.starts,
                "records": window.records,
            }


def _counted(parts: Iterable[Part], update: Callable[[int], object]) -> Iterator[Part]:
    for part in parts:
        yield part
        update(part.end - part.start)


def _decoded(encoder: Encoder, ids: list[int]) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def limited(rows: Iterator[dict[str, Any]], limit: int | None, report: DataReport) -> Iterator[dict[str, Any]]:
    """The first `limit` windows; a note says that there were more."""
    yield from itertools.islice(rows, limit)
    if limit is not None and next(rows, None) is not None:
        report.notes.append(f"the first {limit:,} training windows are used, the rest left out (data.limit)")
