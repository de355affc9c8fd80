"""Conversations -> rows of examples to store, and documents -> rows of windows.

Masks come from token ids, as the renderer gives them: the ids in front of a trained turn are those that generation
starts from, and the ids of the turn are the response.

In a window of text every token is a target, except the first of each document. A document ends with eos, and begins
with BOS if the tokenizer writes one before plain text. Packed documents follow one another and are cut into
windows of exactly max_length tokens. A window names the places where its documents begin: neither attention nor targets
may cross them, or the model would learn from an unrelated text.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from sftmix.common.errors import ContractError, TemplateRefusal
from sftmix.common.fields import TEXT
from sftmix.common.shown import quoted
from sftmix.data.encoder import Encoder
from sftmix.data.renderer import APART, LOST, ChatTemplate
from sftmix.data.report import DataReport
from sftmix.data.store import AT_ONCE, Record, examples_of, short_hash, stored
from sftmix.data.templates import written_bos
from sftmix.types import Example, Message, RenderedTurn


def _tokens_of(example: Example, ids: Sequence[int], spans: Sequence[tuple[int, int]], **more: Any) -> Record:
    """Return the row to store of an example: its values, its token ids, and [start, end) of each response in them."""
    return {
        **stored(example),
        "input_ids": ids,
        "spans": list(itertools.chain(*spans)),  # [(3, 7), (9, 12)] -> [3, 7, 9, 12]
        "n_targets": sum(end - start for start, end in spans),
        **more,
    }


# ------------------------------------------------------------------------------------------------ the mask


SPLIT = "split_turns"
"""The only reason of a conversation that cannot be masked as a whole: the caller makes an example of each turn."""


class Outcome(NamedTuple):
    """The result of tokenising one example.

    reasons  keys of `report.REASONS` to count
    detail   words that the report adds to the example's name
    ids      its tokens, at most max_length; empty if it cannot be trained on
    spans    (start, end) of each trained text, end-of-turn token included
    weights  of the tokens of each span
    """

    reasons: list[str]
    detail: str = ""
    ids: Sequence[int] = ()
    spans: Sequence[tuple[int, int]] = ()
    weights: Sequence[float] = ()


def encode_examples(encoder: Encoder, examples: Sequence[Example], max_length: int) -> list[Outcome]:
    """Tokenise examples, each on its own; one Outcome per example, in order.

    Raises ContractError for an answer of a renderer that is not ours which its contract does not allow.
    """
    assert encoder.renderer is not None
    try:
        found = encoder.renderer.batch(examples)
    except TemplateRefusal as error:
        # The template refuses one of them: alone, each shows whether it is this one.
        if len(examples) == 1:
            return [Outcome(["template_refused"], f": {error}")]
        return [encode_examples(encoder, [example], max_length)[0] for example in examples]
    if type(encoder.renderer) is not ChatTemplate:
        for example, turns in zip(examples, found, strict=True):
            _check_turns(encoder, example, turns)
    return [_masked(turns, encoder.end_ids, max_length) for turns in found]


def _check_turns(encoder: Encoder, example: Example, turns: Any) -> None:
    """Raise ContractError unless a renderer returned a turn for each trained one, of ids with weights."""
    try:
        fits = len(turns) == sum(message.trained for message in example.messages)
        for turn in turns:
            ids = turn.ids  # which are put together anew each time
            kinds = {type(token) for token in ids}
            fits = fits and all(issubclass(kind, Integral) and kind is not bool for kind in kinds)
            fits = fits and min(ids) >= 0 and min(weight for _, weight in turn.parts) >= 0
            fits = fits and (len(ids) > len(turn.prompt) or bool(set(turn.reasons) & {*LOST}))
    except (TypeError, ValueError, AttributeError):  # no turns, or parts that are no pairs of ids and a number
        fits = False
    if not fits:
        raise ContractError(
            f"data.renderer {encoder.name} returned {quoted(turns)} for {example.id}; allowed: a turn for each trained "
            "one, with parts [(ids, weight), ...] of which ids are behind the prompt, and weights are from 0"
        )


def _masked(turns: Sequence[RenderedTurn], ends: Sequence[int], max_length: int) -> Outcome:
    """Return the first max_length tokens of an example, and the spans of its responses in them; or why it has none.

    A conversation of several turns is split unless it begins with the tokens of every prompt and of every turn.
    """
    texts = [turn.ids for turn in turns]
    ids, reasons = texts[-1], sorted(set().union(*(turn.reasons for turn in turns)))
    if lost := [reason for reason in LOST if reason in reasons]:
        return Outcome(lost[:1])
    # Qwen3: the first prompt ends with "<think>\n\n</think>\n\n", and the second one leaves that out.
    if len(turns) > 1 and (APART.intersection(reasons) or any(ids[: len(text)] != text for text in texts)):
        return Outcome([SPLIT])
    if any(text[-1] not in ends for text in texts):  # ours end so; a renderer of a user may not
        return Outcome(["no_end_of_turn"])
    spans = list[tuple[int, int]]()
    weights = list[float]()
    for turn in turns:
        stop = len(turn.prompt)
        for part, weight in turn.parts:
            start = max(stop, 1)  # the first token of a text is predicted by nothing, and never a target
            stop = min(stop + len(part), max_length)
            if weight and start < stop:
                spans.append((start, stop))
                weights.append(weight)
    if not spans:
        return Outcome([*reasons, "no_response_token"])
    if len(ids) > max_length:
        reasons.append("truncated")
    return Outcome(reasons, ids=ids[:max_length], spans=spans, weights=weights)


# -------------------------------------------------------------------------------------------- conversations


def tokenise(
    examples: Iterator[Example], encoder: Encoder, max_length: int, report: DataReport, *, splits: bool
) -> Iterator[Record]:
    """Tokenise examples in their order; yield the rows to store, and add what is to be said to the report.

    splits  the turns of a conversation that must be split take its place; else it has no row: the ids of its turns are
            not among those that a reference is asked for
    """
    while part := list(itertools.islice(examples, AT_ONCE)):
        for example, outcome in zip(part, encode_examples(encoder, part, max_length), strict=True):
            name, reasons = f"{example.id} ({example.source})", outcome.reasons
            if reasons == [SPLIT] and not splits:
                reasons = ["split_alone"]
            for reason in reasons:
                report.add(reason, name + outcome.detail)
            if reasons == [SPLIT]:
                yield from tokenise(examples_of(example, whole=False), encoder, max_length, report, splits=splits)
            if outcome.ids:
                row = _tokens_of(example, outcome.ids, outcome.spans, truncated="truncated" in reasons)
                if set(outcome.weights) != {1.0}:  # null for the others: most data sets have none
                    report.add("weighted", name)
                    row["weights"] = outcome.weights
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
            (ids,) = encoder.spellings.tokenize([content])
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
