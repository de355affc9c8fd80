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

from sftmix.common.progress import progress_bar
from sftmix.data.conversations import WHOLE
from sftmix.data.documents import Documents
from sftmix.data.report import HELD_OUT_BEFORE, DataReport
from sftmix.data.templates import Encoder, writes_bos
from sftmix.types import Int64

STRETCH = 1 << 18
"""Characters tokenised in one call."""

MARGIN = 2048
"""Least number of characters before and behind a seam of two stretches that both have."""

SAME = 32
"""Tokens before a seam, and behind it, that both must have."""


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
            if len(batch) == 1:
                tokens: list[Iterable[list[int]]] = [stretches(encoder, side.text(*batch[0]), spelt=spelt[0])]
            else:
                texts = ["".join(side.text(*part)) for part in batch]
                spelt = [set(encoder.special_in([text])) for text in texts]
                tokens = [[ids] for ids in encoder.tokenize([encoder.content(text) for text in texts])]
            for part, ids_of_part, spellings in zip(batch, tokens, spelt, strict=True):
                place = 0
                begin = bos if part.start == 0 else []
                end = [encoder.end_of_turn_id] if part.end == side.characters(part.record) else []
                for ids in itertools.chain([begin], ids_of_part, [end]):
                    if ids:
                        yield part.record, place, ids
                        place += len(ids)
                bar.update(part.end - part.start)
                if spellings:
                    report.add("spelt_in_document", side.source(part.record), sorted(spellings))


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


def stretches(
    encoder: Encoder, pieces: Iterable[str], *, size: int = STRETCH, spelt: set[str] | None = None
) -> Iterator[list[int]]:
    """Tokenise one text, a stretch at a time; together the ids are those of the text tokenised in one call.

    Neighbouring stretches overlap. They are joined behind a newline around which both have the same tokens; where there
    is none, they are tokenised as one. So is all of the text by a tokenizer that does not give the places of tokens.

    spelt  gets the spellings of special tokens in the text
    """
    rest = iter(pieces)

    def following(least: int) -> str:
        text = ""
        while len(text) < least and (piece := next(rest, None)) is not None:
            text += piece
        return text

    def tokenised(text: str) -> tuple[list[int], Int64]:
        if spelt is not None:
            spelt.update(encoder.special_in([text]))
        if not encoder.tokenizer.is_fast:
            return encoder.tokenize([encoder.content(text)])[0], np.zeros(0, dtype=np.int64)
        ids, begins = encoder.tokenize_content(text)
        return ids, np.maximum.accumulate(np.asarray(begins, dtype=np.int64))

    text = following(size) if encoder.tokenizer.is_fast else "".join(rest)
    (ids, places), first, wanted = tokenised(text), 0, size
    while more := following(wanted):
        start = text.rfind("\n", 0, max(0, len(text) - 4 * MARGIN)) + 1
        later = text[start:] + more
        later_ids, later_places = tokenised(later)
        seam = _seam(text, ids, places, start, later_ids, later_places, int(places[first])) if start else None
        if seam is None:
            done = places[first]
            text += more
            ids, places = (later_ids, later_places) if start == 0 else tokenised(text)
            first, wanted = int(np.searchsorted(places, done)), len(text)
        else:
            yield ids[first : seam[0]]
            text, ids, places, first, wanted = later, later_ids, later_places, seam[1], size
    yield ids[first:]


def _seam(
    text: str, ids: list[int], places: Int64, start: int, later_ids: list[int], later_places: Int64, done: int
) -> tuple[int, int] | None:
    """Find a token behind a newline at which both tokenisations are alike; return its number in each.

    places  the character at which each token begins
    start   where the later text begins in this one
    done    the character up to which tokens were used
    """
    cut = len(text) - MARGIN
    while (cut := text.rfind("\n", max(start + MARGIN, done), cut) + 1) > 0:
        one, other = int(np.searchsorted(places, cut)), int(np.searchsorted(later_places, cut - start))
        before, after = min(SAME, other), min(SAME, len(ids) - 1 - one)  # the last token may go on in the later text
        alike = ids[one - before : one + after] == later_ids[other - before : other + after]
        if after > 0 and places[one] == cut and later_places[other] == cut - start and alike:
            return one, other
        cut -= 1
    return None


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
