"""Conversations -> rows of examples to store, and documents -> rows of windows.

One process and several give the same rows of conversations.

Of a window of text every token is a target but the first of each document in it. A document ends with eos, and begins
with BOS if the tokenizer writes one before plain text. Packed documents stand one after the other and are cut into
windows of exactly max_length tokens. A window names the places where its documents begin: neither attention nor targets
may cross them, or the model would learn from an unrelated text.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from sftmix.common.progress import LiveLine, progress_bar
from sftmix.data.conversations import Conversations, examples_of, stored
from sftmix.data.formats import TEXT
from sftmix.data.masks import SPLIT, Outcome, encode_examples
from sftmix.data.report import DataReport
from sftmix.data.store import AT_ONCE
from sftmix.data.templates import Encoder, writes_bos
from sftmix.types import Example, Int64, Message

WORTH_A_PROCESS = 10_000
"""Conversations for which one more process is worth its start; data.num_proc overrules it."""
_AHEAD = 16
"""Parts per process that are given out together."""

Part = tuple[list[dict[str, Any]], DataReport]
Work = Callable[[Int64], Part]


def _tokens_of(example: Example, ids: list[int], spans: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the values of an example with its tokens, and [start, end) of the responses among them."""
    return {
        **stored(example),
        "input_ids": ids,
        "spans": list(itertools.chain(*spans)),
        "truncated": False,
        "n_targets": sum(end - start for start, end in spans),
    }


# -------------------------------------------------------------------------------------------- conversations


def tokenise(
    conversations: Conversations,
    whole: bool,
    encoder: Encoder,
    max_length: int,
    selected: frozenset[str] | None,
    records: Int64,
) -> Part:
    """Tokenise some records: the rows of their examples to store, and the report on them.

    whole     conversations are examples; else their turns are
    selected  None, or the ids of the examples to keep; others are neither stored nor counted. They say which
              conversations are split: a reference reads them as the target does, whatever its own template.
    """

    def outcomes(examples: list[Example]) -> Iterator[tuple[Example, Outcome]]:
        """Tokenise every example, in file order; behind a conversation that must be split follow its turns."""
        # Conversations with many turns make long lists: pieces of them keep memory bounded.
        for at in range(0, len(examples), AT_ONCE):
            part = examples[at : at + AT_ONCE]
            for example, outcome in zip(part, encode_examples(encoder, part, max_length), strict=True):
                split = outcome.reasons == [SPLIT]
                if split and selected is not None:  # its turns have no place among the ids
                    outcome.reasons = ["split_alone"]
                yield example, outcome
                if split and selected is None:
                    yield from outcomes(examples_of(example, whole=False))

    rows, report, examples = list[dict[str, Any]](), DataReport(), list[Example]()
    for record in conversations.read(records):
        examples += examples_of(record, whole=whole and (selected is None or record.id in selected))
    if selected is not None:
        examples = [example for example in examples if example.id in selected]
    for example, outcome in outcomes(examples):
        name = f"{example.id} ({example.source})"
        for reason in outcome.reasons:
            report.add(reason, f"{name}: {outcome.detail}" if outcome.detail else name)
        if outcome.ids:
            row = _tokens_of(example, outcome.ids, outcome.spans) | {"truncated": "truncated" in outcome.reasons}
            weights = [message.weight for message in example.messages if message.trained][: len(outcome.spans)]
            if set(weights) != {1.0}:
                report.add("weighted", name)
                row["weights"] = weights
            rows.append(row)
    return rows, report


def tokenised(
    work: Work, records: Int64, report: DataReport, *, processes: int | None, progress: bool
) -> Iterator[dict[str, Any]]:
    """Tokenise the records; yield the rows to store, in file order, and add the counts to `report`.

    work       `tokenise` of some records
    processes  number of processes; None takes as many as there are cores, and fewer where there is little work
    """
    parts = np.split(records, range(AT_ONCE, len(records), AT_ONCE))
    many = min(processes or default_processes(len(records)), len(parts))
    done = map(work, parts) if many == 1 else _parallel(work, parts, many)
    with progress_bar("Tokenising", total=len(records), unit=" rows", delay=1, enabled=progress) as bar:
        for part, (rows, more) in zip(parts, done, strict=True):
            report.take(more)
            yield from rows
            bar.update(len(part))


def default_processes(conversations: int) -> int:
    """Number of cores of this process, or fewer where there is little work; 1 where forking is not safe."""
    if sys.platform != "linux":
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), conversations // WORTH_A_PROCESS))


_work: Work | None = None
"""The work of this process on each part, where it is a worker."""


def _parallel(work: Work, parts: list[Int64], processes: int) -> Iterator[Part]:
    """Run `map(work, parts)` in forked workers, which share the memory map and the tokenizer with this process."""
    # Spawned workers would import the user's script again, and need seconds to import transformers.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _begin, (work,)) as pool:
        for at in range(0, len(parts), _AHEAD * processes):  # what waits to be written is in memory
            yield from pool.map(_do, parts[at : at + _AHEAD * processes])


def _begin(work: Work) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parent's threads are not in a fork


def _do(part: Int64) -> Part:
    assert _work is not None
    return _work(part)


# ------------------------------------------------------------------------------------------------ documents


def windows(
    documents: Iterable[tuple[Any, Sequence[int]]], length: int
) -> Iterator[tuple[Any, int, list[int], list[int]]]:
    """Cut the tokens of documents, which stand one after the other, into windows of `length`; the last may be shorter.

    documents  (document, token ids)
    Yields (first document, place of the first token among the tokens of that, tokens, places where documents begin).
    """
    ids, starts = list[int](), list[int]()
    for document, tokens in documents:
        at = 0
        while at < len(tokens):
            if not ids:
                first, offset = document, at
            starts.append(len(ids))
            piece = tokens[at : at + length - len(ids)]
            ids.extend(piece)
            at += len(piece)
            if len(ids) == length:
                yield first, offset, ids, starts
                ids, starts = [], []
    if ids:
        yield first, offset, ids, starts


def encode_windows(
    encoder: Encoder, side: Conversations, length: int, packed: bool, report: DataReport, progress: bool
) -> Iterator[dict[str, Any]]:
    """Make the windows of one side, as `sftmix.data.dataset` stores them.

    The report counts documents that spell special tokens, and windows without a target.
    """
    bos = [int(encoder.tokenizer.bos_token_id)] if writes_bos(encoder.tokenizer) else []
    eos = [encoder.end_of_turn_id]

    def tokens(bar: LiveLine) -> Iterator[tuple[Example, list[int]]]:
        """Tokenise each document in one call: with BOS before its first character, and eos behind its last."""
        for document, text, begins, ends in side.documents():
            content = encoder.content(text)
            if content != text:
                report.add("spelt_in_document", document.source)
            (ids,) = encoder.tokenize([content])
            yield document, (bos if begins else []) + ids + (eos if ends else [])
            bar.update()

    times = Counter[str]()
    with progress_bar("Tokenising", total=len(side.records), unit=" documents", delay=1, enabled=progress) as bar:
        groups = [tokens(bar)] if packed else ([document] for document in tokens(bar))
        for document, offset, ids, starts in itertools.chain.from_iterable(windows(group, length) for group in groups):
            bounds = itertools.pairwise([*starts, len(ids)])
            spans = [(start + 1, end) for start, end in bounds if start + 1 < end]
            if not spans:
                report.add("no_target", f"{document.source}, token {offset}")
                continue
            # Another length, tokenizer or order of documents gives other ids: artefacts of different windows never mix.
            numbers = np.array([len(ids), *ids, len(starts), *starts], dtype="<i8")
            name = hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()
            repeats = f"#{times[name]}" if times[name] else ""
            times[name] += 1
            example = replace(document, id=name + repeats, messages=(Message(TEXT, encoder.decode(ids), True),))
            yield _tokens_of(example, ids, spans) | {"offset": offset, "starts": starts}
