"""Examples -> token ids with a mask of the response tokens.

Masks come from token ids. For every trained turn, two texts are rendered: the conversation before the turn with the
generation prompt, which is the text that generation starts from, and the conversation through the turn, cut after the
end of the turn. The ids of the first text must be the first ids of the second; the other ids of the second are the
response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sftmix.data.special import NUL
from sftmix.data.templates import Encoder, TemplateRefusal
from sftmix.types import Example


@dataclass(slots=True)
class Outcome:
    """The result of tokenising one example.

    ids      its tokens, at most max_length; empty if it cannot be trained on
    spans    (start, end) of each trained response, end-of-turn token included
    reasons  keys of `report.REASONS` to count
    detail   words that the report adds to the example's name
    split    the template rewrites earlier turns: the caller encodes each trained turn as an example of its own
    """

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    detail: str = ""
    split: bool = False


@dataclass(slots=True)
class _Turn:
    """One trained turn.

    prompt   text of the conversation before it, with the generation prompt
    closed   text of the conversation through it
    regular  `closed` is as the template writes it; else it was composed
    own_block  the response brings what else ends the generation prompt, see `Encoder.block`
    """

    prompt: str
    closed: str
    regular: bool
    own_block: bool = False
    prompt_ids: list[int] = field(default_factory=list)
    closed_ids: list[int] = field(default_factory=list)


def encode_examples(encoder: Encoder, examples: Sequence[Example], max_length: int) -> list[Outcome]:
    """Tokenise a batch of examples, each on its own; one Outcome per example, in order."""
    turns = _render(encoder, examples)
    texts = [text for found in turns if not isinstance(found, Outcome) for t in found for text in (t.prompt, t.closed)]
    ids = iter(encoder.tokenize(texts))
    outcomes = []
    for found in turns:
        if isinstance(found, Outcome):
            outcomes.append(found)
            continue
        for turn in found:
            turn.prompt_ids, turn.closed_ids = next(ids), next(ids)
            if encoder.appends_end:
                turn.closed_ids.append(encoder.end_of_turn_id)
        outcome = _single(encoder, found[0]) if len(found) == 1 else _several(encoder, found)
        outcome = _cut(outcome, max_length)
        if outcome.ids and NUL in found[-1].closed:
            outcome.reasons.append("spelt_special")
        outcomes.append(outcome)
    return outcomes


# -------------------------------------------------------------------------------------------- rendering


def _render(encoder: Encoder, examples: Sequence[Example]) -> list[list[_Turn] | Outcome]:
    """Render the trained turns of each example; an Outcome stands for a conversation that the template refuses."""
    places = [[i for i, m in enumerate(example.messages) if m.trained] for example in examples]
    chats = [
        [{"role": m.role, "content": encoder.content(m.content)} for m in example.messages] for example in examples
    ]
    prompts = [chat[:i] for chat, found in zip(chats, places, strict=True) for i in found]
    through = [chat[: i + 1] for chat, found in zip(chats, places, strict=True) for i in found]
    try:
        texts = iter(zip(encoder.render(prompts, prompt=True), encoder.render(through, prompt=False), strict=True))
    except TemplateRefusal as error:
        if len(examples) == 1:
            return [Outcome(reasons=["template_refused"], detail=str(error))]
        return [outcome for example in examples for outcome in _render(encoder, [example])]
    return [
        [_turn(encoder, *next(texts), chat[i]["content"]) for i in found]
        for chat, found in zip(chats, places, strict=True)
    ]


def _turn(encoder: Encoder, prompt: str, full: str, content: str) -> _Turn:
    """Cut the text behind the end of the turn; compose it if the template writes it without the prompt.

    A response that brings its own thinking has no empty block before it: its prompt ends before that.
    """
    if full.endswith(encoder.ending + encoder.trailer):
        for begun in (prompt, prompt.removesuffix(encoder.block)):
            if full.startswith(begun):
                closed = full[: len(full) - len(encoder.trailer)]
                return _Turn(begun, closed, regular=True, own_block=begun != prompt)
    return _Turn(prompt, prompt + encoder.lead + content + encoder.ending, regular=False)


# ----------------------------------------------------------------------------------------------- masks


def _single(encoder: Encoder, turn: _Turn) -> Outcome:
    """Mask of a conversation with one trained turn, at its end: the usual case."""
    start, ids = len(turn.prompt_ids), turn.closed_ids
    reasons = [*([] if turn.regular else ["composed"]), *(["own_block"] if turn.own_block else [])]
    if ids[:start] != turn.prompt_ids:
        apart = _apart(encoder, turn)
        if apart is None:
            return Outcome(reasons=["prefix_mismatch"])
        ids, reasons = apart, [*reasons, "boundary"]
    if ids[-1] != encoder.end_of_turn_id:
        return Outcome(reasons=["no_end_of_turn"])
    # The first token of a text is predicted by nothing, so it can never be a target.
    return Outcome(ids, [(max(start, 1), len(ids))], reasons)


def _apart(encoder: Encoder, turn: _Turn) -> list[int] | None:
    """Tokenise prompt and rest apart, because one token would span both; None if that changes the text.

    The rest is tokenised behind a special token, so that no tokenizer takes it for the beginning of a text.
    """
    anchor = str(encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id))
    rest = encoder.tokenize([anchor + turn.closed[len(turn.prompt) :]])[0]
    if rest[:1] != [encoder.end_of_turn_id]:
        return None
    ids = turn.prompt_ids + rest[1:] + ([encoder.end_of_turn_id] if encoder.appends_end else [])
    same = encoder.decode(ids) == encoder.decode(turn.closed_ids)
    return ids if same else None


def _several(encoder: Encoder, turns: list[_Turn]) -> Outcome:
    """Mask of a whole conversation; it is split into its turns unless each begins where its own prompt ends."""
    ids = turns[-1].closed_ids
    spans = []
    for turn in turns:
        start, end = len(turn.prompt_ids), len(turn.closed_ids)
        whole = turn.regular and ids[:end] == turn.closed_ids and ids[:start] == turn.prompt_ids
        if not whole or ids[end - 1] != encoder.end_of_turn_id or (encoder.appends_end and turn is not turns[-1]):
            return Outcome(reasons=["split_turns"], split=True)
        spans.append((max(start, 1), end))
    return Outcome(ids, spans, ["own_block"] if any(turn.own_block for turn in turns) else [])


def _cut(outcome: Outcome, max_length: int) -> Outcome:
    """Keep the first max_length tokens; drop the example if no response token is among them."""
    if len(outcome.ids) <= max_length:
        return outcome
    spans = [(start, min(end, max_length)) for start, end in outcome.spans]
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        return Outcome(reasons=[*outcome.reasons, "no_response_token"])
    return Outcome(outcome.ids[:max_length], spans, [*outcome.reasons, "truncated"])
