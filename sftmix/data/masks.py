"""Examples -> token ids with a mask of the response tokens.

Masks come from token ids. For every trained turn, two texts are rendered: the conversation before the turn with the
generation prompt, which is the text that generation starts from, and the conversation through the turn, cut after the
end of the turn. The ids of the first text must be the first ids of the second; the other ids of the second are the
response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sftmix.data.templates import NUL, Encoder, TemplateRefusal
from sftmix.types import Example

SPLIT = "split_turns"
"""The only reason of an example whose turns the caller encodes as examples of their own: the template rewrites them."""


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
    closed  text of the conversation through it
    reason  composed: `closed` is not as the template writes it; own_block: the response brings what else ends the
            generation prompt, see `Encoder.block`; or None
    """

    prompt: str
    closed: str
    reason: str | None


def encode_examples(encoder: Encoder, examples: Sequence[Example], max_length: int) -> list[Outcome]:
    """Tokenise a batch of examples, each on its own; one Outcome per example, in order."""
    try:
        turns_of = _render(encoder, examples)
    except TemplateRefusal as error:
        if len(examples) == 1:
            return [Outcome(reasons=["template_refused"], detail=str(error))]
        return [encode_examples(encoder, [example], max_length)[0] for example in examples]
    ids = iter(encoder.tokenize([text for turns in turns_of for t in turns for text in (t.prompt, t.closed)]))
    end = [encoder.end_of_turn_id] if encoder.appends_end else []
    outcomes = []
    for turns in turns_of:
        outcome = _masked(encoder, turns, [(next(ids), next(ids) + end) for _ in turns], max_length)
        if outcome.ids and NUL in turns[-1].closed:
            outcome.reasons.append("spelt_special")
        outcomes.append(outcome)
    return outcomes


# -------------------------------------------------------------------------------------------- rendering


def _render(encoder: Encoder, examples: Sequence[Example]) -> list[list[_Turn]]:
    """Render the trained turns of each example. Raises TemplateRefusal if the template refuses one of them.

    The text is cut behind the end of the turn. A response that brings its own thinking has no empty block before it:
    its prompt ends before that. A turn that the template writes without its prompt is composed.
    """
    chats = [[{"role": m.role, "content": encoder.content(m.content)} for m in e.messages] for e in examples]
    places = [(n, i) for n, example in enumerate(examples) for i, m in enumerate(example.messages) if m.trained]
    prompts = encoder.render([chats[n][:i] for n, i in places], prompt=True)
    through = encoder.render([chats[n][: i + 1] for n, i in places], prompt=False)
    turns: list[list[_Turn]] = [[] for _ in examples]
    for (n, i), prompt, full in zip(places, prompts, through, strict=True):
        shorter, closed = prompt.removesuffix(encoder.block), full.removesuffix(encoder.trailer)
        written = closed.endswith(encoder.ending) and full.endswith(encoder.trailer)
        if written and full.startswith(prompt):
            turn = _Turn(prompt, closed, None)
        elif written and full.startswith(shorter):
            turn = _Turn(shorter, closed, "own_block")
        else:
            turn = _Turn(prompt, prompt + encoder.lead + chats[n][i]["content"] + encoder.ending, "composed")
        turns[n].append(turn)
    return turns


# ----------------------------------------------------------------------------------------------- masks


def _masked(
    encoder: Encoder, turns: list[_Turn], tokens: list[tuple[list[int], list[int]]], max_length: int
) -> Outcome:
    """Mask of the first max_length tokens; a whole conversation is split unless each turn begins behind its own prompt.

    tokens  (ids of the prompt, ids of the conversation through the turn) of each turn
    """
    last, end = turns[-1], encoder.end_of_turn_id
    reasons = sorted({turn.reason for turn in turns if turn.reason})
    prompt, ids = tokens[-1]
    fits = all(ids[: len(part)] == part for pair in tokens for part in pair)
    if len(turns) > 1:
        ends = all(closed[-1] == end for _, closed in tokens)
        if "composed" in reasons or not (fits and ends) or encoder.appends_end:
            return Outcome(reasons=[SPLIT])
    elif not fits:
        if (apart := _apart(encoder, last, prompt, ids)) is None:
            return Outcome(reasons=["prefix_mismatch"])
        tokens, ids, reasons = [(prompt, apart)], apart, [*reasons, "boundary"]
    if ids[-1] != end:
        return Outcome(reasons=["no_end_of_turn"])
    # The first token of a text is predicted by nothing, so it can never be a target.
    spans = [(max(len(before), 1), min(len(closed), max_length)) for before, closed in tokens]
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        return Outcome(reasons=[*reasons, "no_response_token"])
    if len(ids) > max_length:
        reasons = [*reasons, "truncated"]
    return Outcome(ids[:max_length], spans, reasons)


def _apart(encoder: Encoder, turn: _Turn, prompt: list[int], closed: list[int]) -> list[int] | None:
    """Tokenise prompt and rest apart, because one token would span both; None if that changes the text.

    The rest is tokenised behind a special token, so that no tokenizer takes it for the beginning of a text.
    """
    anchor = str(encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id))
    rest = encoder.tokenize([anchor + turn.closed[len(turn.prompt) :]])[0]
    if rest[:1] != [encoder.end_of_turn_id]:
        return None
    ids = prompt + rest[1:] + ([encoder.end_of_turn_id] if encoder.appends_end else [])
    return ids if encoder.decode(ids) == encoder.decode(closed) else None
