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
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from sftmix.common.progress import progress_bar
from sftmix.data.conversations import Conversations, tokens_of
from sftmix.data.formats import TEXT
from sftmix.data.report import DataReport
from sftmix.data.templates import Encoder, writes_bos
from sftmix.types import Example, Message

T = TypeVar("T")


@dataclass(slots=True)
class Window(Generic[T]):
    """Tokens of one example.

    document   the first document
    offset     place of the first token among the tokens of that
    input_ids  the tokens
    starts     places where the documents (or pieces of documents) begin
    """

    document: T
    offset: int
    input_ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[start, end) of the targets: nothing predicts the first token of a document in a window."""
        bounds = itertools.pairwise([*self.starts, len(self.input_ids)])
        return [(start + 1, end) for start, end in bounds if start + 1 < end]

    def content_hash(self) -> str:
        """Hash of the tokens and of the places where documents begin, 16 hex digits.

        Another length, tokenizer or order of documents gives other hashes, so artefacts of different windows never mix.
        """
        numbers = [len(self.input_ids), *self.input_ids, len(self.starts), *self.starts]
        return hashlib.blake2b(np.asarray(numbers, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def windows(documents: Iterable[tuple[T, Sequence[int]]], length: int, *, packed: bool) -> Iterator[Window[T]]:
    """Cut the tokens of documents into windows of `length`.

    documents  (document, token ids)
    packed     a window may hold several documents; else a document ends its window
    """
    window = None
    for document, ids in documents:
        at = 0
        while at < len(ids):
            if window is None:
                window = Window(document, at)
            window.starts.append(len(window.input_ids))
            piece = ids[at : at + length - len(window.input_ids)]
            window.input_ids.extend(piece)
            at += len(piece)
            if len(window.input_ids) == length or (at == len(ids) and not packed):
                yield window
                window = None
    if window is not None:
        yield window


def document_tokens(
    encoder: Encoder, side: Conversations, report: DataReport, progress: bool
) -> Iterator[tuple[Example, list[int]]]:
    """Tokenise each document into (document, ids) in one call; the report counts those that spell special tokens.

    BOS stands before the first character of a document and eos behind its last; a part in the middle has neither.
    """
    bos = [int(encoder.tokenizer.bos_token_id)] if writes_bos(encoder.tokenizer) else []
    eos = [encoder.end_of_turn_id]
    with progress_bar("Tokenising", total=len(side.records), unit=" documents", delay=1, enabled=progress) as bar:
        for document, text, begins, ends in side.documents():
            content = encoder.content(text)
            ids = encoder.tokenize([content])[0]
            if content != text:
                report.add("spelt_in_document", document.source)
            yield document, (bos if begins else []) + ids + (eos if ends else [])
            bar.update()


def encode_windows(
    encoder: Encoder, side: Conversations, length: int, packed: bool, report: DataReport, progress: bool
) -> Iterator[dict[str, Any]]:
    """Make the windows of one side, as `sftmix.data.dataset` stores them; count those without a target."""
    times: Counter[str] = Counter()
    documents = document_tokens(encoder, side, report, progress)
    for window in windows(documents, length, packed=packed):
        if not window.spans:
            report.add("no_target", f"{window.document.source}, token {window.offset}")
            continue
        name = window.content_hash()
        repeats = f"#{times[name]}" if times[name] else ""
        times[name] += 1
        text = Message(TEXT, encoder.decode(window.input_ids), True)
        example = replace(window.document, id=name + repeats, messages=(text,))
        yield tokens_of(example, window.input_ids, window.spans) | {"offset": window.offset, "starts": window.starts}


def first_windows(rows: Iterator[dict[str, Any]], limit: int | None, report: DataReport) -> Iterator[dict[str, Any]]:
    """Take the first `limit` windows; a note in the report says that there were more."""
    yield from itertools.islice(rows, limit)
    if limit is not None and next(rows, None) is not None:
        report.notes.append(f"the first {limit:,} training windows are used, the rest left out (data.limit)")
