"""Conversations -> rows of examples to store, and documents -> rows of windows.

In a window of text every token is a target, except the first of each document. A document ends with eos, and begins
with BOS if the tokenizer writes one before plain text. Packed documents follow one another and are cut into
windows of exactly max_length tokens. A window names the places where its documents begin: neither attention nor targets
may cross them, or the model would learn from an unrelated text.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sftmix.data.report import DataReport
from sftmix.data.store import AT_ONCE, stored
from sftmix.disk.cache import Record, short_hash
from sftmix.text.encoder import Encoder
from sftmix.text.mask import encode_each
from sftmix.text.templates import written_bos
from sftmix.types import Example, Message
from sftmix.words.errors import DataError, TokenizerFailure
from sftmix.words.fields import TEXT


def _tokens_of(example: Example, ids: Sequence[int], spans: Sequence[tuple[int, int]], **more: Any) -> Record:
    """Return the row to store of an example: its values, its token ids, and [start, end) of each response in them."""
    return {
        **stored(example),
        "input_ids": ids,
        "spans": list(itertools.chain(*spans)),  # [(3, 7), (9, 12)] -> [3, 7, 9, 12]
        "n_targets": sum(end - start for start, end in spans),
        **more,
    }


# -------------------------------------------------------------------------------------------- conversations


def tokenise(
    examples: Iterator[Example], encoder: Encoder, max_length: int, report: DataReport, *, splits: bool
) -> Iterator[Record]:
    """Tokenise examples in their order; yield the rows to store, and add what is to be said to the report.

    splits  the turns of a conversation that must be split take its place; else it has no row: the ids of its turns are
            not among those that a reference is asked for
    """
    assert encoder.renderer is not None
    while part := list(itertools.islice(examples, AT_ONCE)):
        for example, found in encode_each(encoder.renderer, part, max_length, splits=splits):
            name = f"{example.id} ({example.source})"
            for reason in found.reasons:
                report.add(reason, name + found.detail)
            if found.ids:
                row = _tokens_of(example, found.ids, found.spans, truncated="truncated" in found.reasons)
                if set(found.span_weights) != {1.0}:  # null for the others: most data sets have none
                    report.add("weighted", name)
                    row["weights"] = found.span_weights
                yield row


# ------------------------------------------------------------------------------------------------ documents


def windows(documents: Iterable[tuple[Any, Sequence[int]]], length: int, packed: bool) -> Iterator[Any]:
    """Cut the tokens of documents, which follow one another, into windows of `length`; the last may be shorter.

    documents  (document, token ids)
    packed     a window may hold several documents; else each document is cut alone, and its last window may be shorter
    Yields (first document, tokens, places where documents begin).
    """
    ids, starts = list[int](), list[int]()
    for document, tokens in documents:
        at = 0
        while at < len(tokens):
            if not ids:
                first = document
            # length 4, [1, 1, 1] and [2, 2, 2] -> [1, 1, 1, 2] with starts [0, 3], and [2, 2] with [0]
            starts.append(len(ids))
            piece = tokens[at : at + length - len(ids)]
            ids += piece
            at += len(piece)
            if len(ids) == length or not (packed or at < len(tokens)):
                yield first, ids, starts
                ids, starts = [], []
    if ids:
        yield first, ids, starts


def encode_windows(
    documents: Iterable[Example], encoder: Encoder, length: int, report: DataReport, *, packed: bool
) -> Iterator[Record]:
    """Make the windows of documents, as `sftmix.data.dataset` stores them.

    The report counts documents that spell special tokens, and windows without a target.
    """
    bos = written_bos(encoder.tokenizer)
    eos = [encoder.end_of_turn_id]

    def tokens() -> Iterator[tuple[Example, list[int]]]:
        """Tokenise each document in one call: with BOS before its first character, and eos behind its last."""
        for document in documents:
            text = document.messages[0].content
            content = encoder.spellings.as_text(text)
            if content != text:
                report.add("spelt_in_document", document.source)
            try:
                (ids,) = encoder.spellings.tokenize([content])
            except TokenizerFailure as error:
                raise DataError(f"{document.source}: {error}") from error
            yield document, [*bos, *ids, *eos]

    counts = Counter[str]()
    for document, ids, starts in windows(tokens(), length, packed):
        bounds = itertools.pairwise([*starts, len(ids)])  # [0, 3] of 4 ids -> (0, 3), (3, 4)
        spans = [(start + 1, end) for start, end in bounds if start + 1 < end]
        if not spans:
            report.add("no_target", document.source)
            continue
        # The id is a hash of the tokens: other windows (by length, tokenizer or order of documents) have other ids,
        # so no file about them is taken for one about these.
        # The lengths keep a token from being taken for a start.
        numbers = np.array([len(ids), *ids, len(starts), *starts], dtype="<i8")
        name = short_hash(numbers.tobytes())
        suffix = f"#{counts[name]}" if counts[name] else ""
        counts[name] += 1
        example = replace(document, id=name + suffix, messages=(Message(TEXT, encoder.decode(ids), True),))
        yield _tokens_of(example, ids, spans, truncated=False, starts=starts)
