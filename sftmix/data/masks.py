"""Examples -> token ids with a mask of the response tokens.

Masks come from token ids. For every trained turn i, the conversation before it is rendered with the generation prompt
(exactly what generation will start from) and the conversation up to it is rendered and cut after the end of the turn;
the ids of the first must be the first ids of the second. What lies between their lengths is the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sftmix.data.templates import Encoder, TemplateRefusal, as_dict
from sftmix.types import Example


@dataclass(slots=True)
class Outcome:
    """The result of tokenising one example.

    ids      its tokens, at most max_length; empty where it cannot be trained on
    spans    (start, end) of each trained response, end-of-turn token included
    reasons  keys of `report.REASONS` to count
    detail   what the report adds to its name
    split    the template rewrites earlier turns: the caller encodes each trained turn as an example of its own
    """

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    detail: str = ""
    split: bool = False


@dataclass(slots=True)
class _Turn:
    """One trained turn: text and ids of its prompt, and of the conversation through that turn."""

    prompt: str
    closed: str
    content: str
    regular: bool
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
        outcomes.append(_cut(outcome, max_length))
    return outcomes


# -------------------------------------------------------------------------------------------- rendering


def _render(encoder: Encoder, examples: Sequence[Example]) -> list[list[_Turn] | Outcome]:
    """The trained turns of each example as text; an Outcome where the template refuses the conversation."""
    places = [[i for i, m in enumerate(example.messages) if m.trained] for example in examples]
    chats = [[as_dict(m) for m in example.messages] for example in examples]
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
    """Cut off what follows the end of the turn; where the text does not begin with the prompt, compose it."""
    if full.startswith(prompt) and full.endswith(encoder.ending + encoder.trailer):
        return _Turn(prompt, full[: len(full) - len(encoder.trailer)], content, regular=True)
    return _Turn(prompt, prompt + encoder.lead + content + encoder.ending, content, regular=False)


# ----------------------------------------------------------------------------------------------- masks


def _single(encoder: Encoder, turn: _Turn) -> Outcome:
    """The usual case: one trained turn, at the end."""
    start, ids, reasons = len(turn.prompt_ids), turn.closed_ids, [] if turn.regular else ["composed"]
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
    """Prompt ids, then the rest tokenised on its own, for a token that would span both; None if the text changes.

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
    """A whole conversation: every trained turn must be where its own prompt ends, or the row is split into turns."""
    ids = turns[-1].closed_ids
    spans = []
    for turn in turns:
        start, end = len(turn.prompt_ids), len(turn.closed_ids)
        whole = turn.regular and ids[:end] == turn.closed_ids and ids[:start] == turn.prompt_ids
        if not whole or ids[end - 1] != encoder.end_of_turn_id or (encoder.appends_end and turn is not turns[-1]):
            return Outcome(reasons=["split_turns"], split=True)
        spans.append((max(start, 1), end))
    return Outcome(ids, spans)


def _cut(outcome: Outcome, max_length: int) -> Outcome:
    """Keep the first max_length tokens; without a response token among them the example is dropped."""
    if len(outcome.ids) <= max_length:
        return outcome
    spans = [(start, min(end, max_length)) for start, end in outcome.spans]
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        return Outcome(reasons=[*outcome.reasons, "no_response_token"])
    return Outcome(outcome.ids[:max_length], spans, [*outcome.reasons, "truncated"])
