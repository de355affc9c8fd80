"""Conversations -> rows of examples to store, and documents -> rows of windows.

Masks come from token ids. For every trained turn, two texts are rendered: the conversation before the turn with the
generation prompt, which is the text that generation starts from, and the conversation through the turn, cut after the
end of the turn. The ids of the first text must be the first ids of the second; the other ids of the second are the
response. One process and several give the same rows.

In a window of text every token is a target, except the first of each document. A document ends with eos, and begins
with BOS if the tokenizer writes one before plain text. Packed documents stand one after the other and are cut into
windows of exactly max_length tokens. A window names the places where its documents begin: neither attention nor targets
may cross them, or the model would learn from an unrelated text.
"""

import hashlib
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from sftmix.common.progress import progress_bar
from sftmix.data.conversations import Conversations, examples_of, stored
from sftmix.data.formats import TEXT
from sftmix.data.report import DataReport
from sftmix.data.store import AT_ONCE, Record
from sftmix.data.templates import NUL, Encoder, TemplateRefusal, writes_bos
from sftmix.types import Example, Int64, Message

WORTH_A_PROCESS = 10_000
"""Conversations per process, so that it is worth the time to start it; data.num_proc overrules this."""
_AHEAD = 16
"""Parts per process that are submitted together."""

Part = tuple[list[Record], DataReport]
Work = Callable[[Int64], Part]


def _tokens_of(example: Example, ids: list[int], spans: list[tuple[int, int]]) -> Record:
    """Return the row to store of an example: its values, its token ids, and [start, end) of each response in them."""
    return {
        **stored(example),
        "input_ids": ids,
        "spans": list(itertools.chain(*spans)),
        "truncated": False,
        "n_targets": sum(end - start for start, end in spans),
    }


# ------------------------------------------------------------------------------------------------ the mask


SPLIT = "split_turns"
"""The only reason of a conversation that cannot be masked as a whole: the caller makes an example of each turn."""


@dataclass(slots=True)
class Outcome:
    """The result of tokenising one example.

    ids      its tokens, at most max_length; empty if it cannot be trained on
    spans    (start, end) of each trained response, end-of-turn token included
    reasons  keys of `report.REASONS` to count
    detail   words that the report adds to the example's name
    """

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    detail: str = ""


class _Turn(NamedTuple):
    """One trained turn.

    prompt  text of the conversation before it, with the generation prompt
    closed  text of the conversation through it, cut behind the end of the turn
    reason  composed: the template writes no such text, so it is put together from the prompt and the response;
            own_block: the response has its own block, so the prompt ends before the empty one of `Encoder.block`; or ""
    """

    prompt: str
    closed: str
    reason: str


def encode_examples(encoder: Encoder, examples: Sequence[Example], max_length: int) -> list[Outcome]:
    """Tokenise a batch of examples, each on its own; one Outcome per example, in order."""
    chats = [[{"role": m.role, "content": encoder.content(m.content)} for m in e.messages] for e in examples]
    places = [(n, i) for n, example in enumerate(examples) for i, m in enumerate(example.messages) if m.trained]
    try:
        prompts = encoder.render([chats[n][:i] for n, i in places], prompt=True)
        through = encoder.render([chats[n][: i + 1] for n, i in places], prompt=False)
    except TemplateRefusal as error:
        # The template refuses one of them: alone, each tells whether it is this one.
        if len(examples) == 1:
            return [Outcome(reasons=["template_refused"], detail=str(error))]
        return [encode_examples(encoder, [example], max_length)[0] for example in examples]
    turns_of: list[list[_Turn]] = [[] for _ in examples]
    for (n, i), prompt, full in zip(places, prompts, through, strict=True):
        shorter, closed, reason = prompt.removesuffix(encoder.block), full.removesuffix(encoder.trailer), ""
        ends = closed.endswith(encoder.ending) and full.endswith(encoder.trailer)
        if not ends or not full.startswith(shorter):  # the template does not write it behind its prompt
            closed, reason = prompt + encoder.lead + chats[n][i]["content"] + encoder.ending, "composed"
        elif not full.startswith(prompt):  # a response with its own thinking has no empty block before it
            prompt, reason = shorter, "own_block"
        turns_of[n].append(_Turn(prompt, closed, reason))
    ids = iter(encoder.tokenize([text for turns in turns_of for t in turns for text in (t.prompt, t.closed)]))
    end = [encoder.end_of_turn_id] if encoder.appends_end else []
    return [_masked(encoder, turns, [(next(ids), next(ids) + end) for _ in turns], max_length) for turns in turns_of]


def _masked(
    encoder: Encoder, turns: list[_Turn], tokens: list[tuple[list[int], list[int]]], max_length: int
) -> Outcome:
    """Return the first max_length tokens of an example, and the spans of its responses in them.

    A conversation of several turns is split unless it begins with the tokens of every prompt and of every turn.

    tokens  (ids of the prompt, ids of the conversation through the turn) of each turn
    """
    last, end = turns[-1], encoder.end_of_turn_id
    reasons = sorted({turn.reason for turn in turns} - {""})
    prompt, ids = tokens[-1]
    fits = all(ids[: len(part)] == part for pair in tokens for part in pair)
    if len(turns) > 1:
        ends = all(closed[-1] == end for _, closed in tokens)
        if "composed" in reasons or not (fits and ends) or encoder.appends_end:
            return Outcome(reasons=[SPLIT])
    elif not fits:
        # A token would span the end of the prompt and the response, so both are tokenised apart: the response behind a
        # special token, so that no tokenizer takes it for the beginning of a text.
        anchor = str(encoder.tokenizer.convert_ids_to_tokens(end))
        response = encoder.tokenize([anchor + last.closed[len(last.prompt) :]])[0]
        apart = prompt + response[1:] + ([end] if encoder.appends_end else [])
        if response[:1] != [end] or encoder.decode(apart) != encoder.decode(ids):
            return Outcome(reasons=["prefix_mismatch"])
        tokens, ids = [(prompt, apart)], apart
        reasons.append("boundary")
    if ids[-1] != end:
        return Outcome(reasons=["no_end_of_turn"])
    # The first token of a text is predicted by nothing, so it can never be a target.
    spans = [(max(len(prompt), 1), min(len(closed), max_length)) for prompt, closed in tokens]
    spans = [(start, stop) for start, stop in spans if start < stop]
    if not spans:
        return Outcome(reasons=[*reasons, "no_response_token"])
    if len(ids) > max_length:
        reasons.append("truncated")
    if NUL in last.closed:
        reasons.append("spelt_special")
    return Outcome(ids[:max_length], spans, reasons)


# -------------------------------------------------------------------------------------------- conversations


def tokenise(
    conversations: Conversations,
    whole: bool,
    encoder: Encoder,
    max_length: int,
    selected: frozenset[str] | None,
    records: Int64,
) -> Part:
    """Tokenise some records; return the rows of their examples to store, and the report on them.

    whole     True if conversations are examples, False if each of their trained turns is one
    selected  None, or the ids of the examples to keep; others are neither stored nor counted. They also decide which
              conversations are split, so that a reference has the examples of the target, whatever its own template.
    """

    rows, report = list[Record](), DataReport()

    def add(examples: list[Example]) -> None:
        """Tokenise every example, in file order; the turns of a conversation that must be split take its place."""
        # Conversations with many turns make long lists, so they are taken in pieces, which bounds the memory.
        for at in range(0, len(examples), AT_ONCE):
            part = examples[at : at + AT_ONCE]
            for example, outcome in zip(part, encode_examples(encoder, part, max_length), strict=True):
                name, split = f"{example.id} ({example.source})", outcome.reasons == [SPLIT]
                if split and selected is not None:  # the ids of its turns are not among the selected ones
                    outcome.reasons = ["split_alone"]
                for reason in outcome.reasons:
                    report.add(reason, f"{name}: {outcome.detail}" if outcome.detail else name)
                if split and selected is None:
                    add(list(examples_of(example, whole=False)))
                if outcome.ids:
                    row = _tokens_of(example, outcome.ids, outcome.spans)
                    row["truncated"] = "truncated" in outcome.reasons
                    weights = [m.weight for m in example.messages if m.trained][: len(outcome.spans)]
                    if set(weights) != {1.0}:
                        report.add("weighted", name)
                        row["weights"] = weights
                    rows.append(row)

    examples = list[Example]()
    for record in conversations.read(records):
        examples += examples_of(record, whole=whole and (selected is None or record.id in selected))
    add(examples if selected is None else [example for example in examples if example.id in selected])
    return rows, report


def tokenised(
    work: Work, records: Int64, report: DataReport, *, processes: int | None, progress: bool
) -> Iterator[Record]:
    """Tokenise the records; yield the rows to store, in file order, and add the counts to `report`.

    work       does `tokenise` for some records
    processes  number of processes; None takes as many as there are cores, and fewer where there is little work
    """
    parts = np.split(records, range(AT_ONCE, len(records), AT_ONCE))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere forking is not safe
    workers = min(processes or max(1, min(cores, len(records) // WORTH_A_PROCESS)), len(parts))
    results = map(work, parts) if workers == 1 else _parallel(work, parts, workers)
    with progress_bar("Tokenising", total=len(records), unit=" rows", delay=1, enabled=progress) as bar:
        for part, (rows, part_report) in zip(parts, results, strict=True):
            report.take(part_report)
            yield from rows
            bar.update(len(part))


_work: Work | None = None
"""The function that does a part; forked workers inherit it from this process."""


def _parallel(work: Work, parts: list[Int64], processes: int) -> Iterator[Part]:
    """Run `map(work, parts)` in forked workers, which share the memory map and the tokenizer with this process."""
    global _work
    _work = work
    # Spawned workers would import the user's script again, and need seconds to import transformers.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        for at in range(0, len(parts), _AHEAD * processes):  # few at once: results wait in memory until written
            yield from pool.map(_do, parts[at : at + _AHEAD * processes])


def _do(part: Int64) -> Part:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the parent's threads
    assert _work is not None
    return _work(part)


# ------------------------------------------------------------------------------------------------ documents


def windows(
    documents: Iterable[tuple[Any, Sequence[int]]], length: int, packed: bool
) -> Iterator[tuple[Any, int, list[int], list[int]]]:
    """Cut the tokens of documents, which stand one after the other, into windows of `length`; the last may be shorter.

    documents  (document, token ids)
    packed     a window may hold several documents; else each document is cut alone, and its last window may be shorter
    Yields (first document, offset of the first token in this document, tokens, places where documents begin).
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
            if len(ids) == length or not (packed or at < len(tokens)):
                yield first, offset, ids, starts
                ids, starts = [], []
    if ids:
        yield first, offset, ids, starts


def encode_windows(
    encoder: Encoder, side: Conversations, length: int, packed: bool, report: DataReport, progress: bool
) -> Iterator[Record]:
    """Make the windows of the training or of the held-out documents, as `sftmix.data.dataset` stores them.

    The report counts documents that spell special tokens, and windows without a target.
    """
    bos = [int(encoder.tokenizer.bos_token_id)] if writes_bos(encoder.tokenizer) else []
    eos = [encoder.end_of_turn_id]

    def tokens() -> Iterator[tuple[Example, list[int]]]:
        """Tokenise each document in one call: with BOS before its first character, and eos behind its last."""
        for document, text, begins, ends in side.documents():
            content = encoder.content(text)
            if content != text:
                report.add("spelt_in_document", document.source)
            (ids,) = encoder.tokenize([content])
            yield document, (bos if begins else []) + ids + (eos if ends else [])
            bar.update()

    counts = Counter[str]()
    with progress_bar("Tokenising", total=len(side.records), unit=" documents", delay=1, enabled=progress) as bar:
        for document, offset, ids, starts in windows(tokens(), length, packed):
            bounds = itertools.pairwise([*starts, len(ids)])
            spans = [(start + 1, end) for start, end in bounds if start + 1 < end]
            if not spans:
                report.add("no_target", f"{document.source}, token {offset}")
                continue
            # The id is a hash of the tokens: other windows (by length, tokenizer or order of documents) have other ids,
            # so no file about them is taken for one about these.
            numbers = np.array([len(ids), *ids, len(starts), *starts], dtype="<i8")
            name = hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()
            suffix = f"#{counts[name]}" if counts[name] else ""
            counts[name] += 1
            example = replace(document, id=name + suffix, messages=(Message(TEXT, encoder.decode(ids), True),))
            yield _tokens_of(example, ids, spans) | {"offset": offset, "starts": starts}
