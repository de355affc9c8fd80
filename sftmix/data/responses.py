"""A trained turn as text: the prompt that the model is served with, and the response that it is to write behind it."""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sftmix.data.encoder import Encoder
from sftmix.data.layout import TemplateLayout
from sftmix.data.probe import written_behind
from sftmix.data.templates import TemplateRefusal, reads
from sftmix.data.thoughts import closing_at_head, opened_by, without_thought_tags
from sftmix.types import Example, Message


class Response(NamedTuple):
    """One trained turn.

    served  the generation prompt that the exported template writes
    prompt  all that is in front of the trained text
    parts   the text from the beginning through each part of the response, and the weight of that part; the last one
            ends with the end of the turn
    reasons keys of `report.REASONS` to count; if one of LOST is among them, the turn cannot be trained
    """

    served: str
    prompt: str
    parts: list[tuple[str, float]]
    reasons: list[str]


LOST = ("template_refused", "tools_lost", "calls_lost")
"""Reasons why a turn cannot be trained under a template."""


class Turn(NamedTuple):
    """The place of a trained turn, and how its conversation is rendered.

    chat     all turns through this one, as the template takes them
    tools    the functions that the assistant may call
    options  values of the template's variables
    """

    message: Message
    chat: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]


def responses_of(encoder: Encoder, examples: Sequence[Example]) -> list[list[Response]]:
    """Return the trained turns of each example, in order. Raises TemplateRefusal if the template refuses one."""
    turns = [_trained(encoder, example) for example in examples]
    groups = defaultdict[str, list[Turn]](list)
    for turn in itertools.chain(*turns):
        groups[json.dumps([turn.tools, turn.options])].append(turn)
    found = dict[int, Response]()
    for group in groups.values():
        tools, options = group[0].tools, group[0].options
        before = [turn.chat[:-1] for turn in group]
        prompts = encoder.render(before, prompt=True, tools=tools, **options)
        served = encoder.render(before, prompt=True, tools=tools) if options else prompts
        rendered = encoder.render([turn.chat for turn in group], prompt=False, tools=tools, **options)
        for turn, *texts in zip(group, prompts, served, rendered, strict=True):
            found[id(turn)] = _response(encoder, turn, *texts)
    return [[found[id(turn)] for turn in of_example] for of_example in turns]


def _trained(encoder: Encoder, example: Example) -> list[Turn]:
    """Return the trained turns of an example."""
    chat = encoder.turns(example.messages)
    tools = encoder.as_text(example.tools)
    return [
        Turn(message, [*chat[:place], encoder.turn(message, inline=True)], tools, example.options)
        for place, message in enumerate(example.messages)
        if message.trained
    ]


def _response(encoder: Encoder, turn: Turn, prompt: str, served: str, rendered: str) -> Response:
    """Put a response behind its prompt: as the template writes it there, or else from its parts."""
    layout = encoder.layout
    assert layout is not None
    thought, answer = map(encoder.as_text, encoder.divided(turn.message))
    reasons = _left_out(layout, turn, prompt)
    if not rendered.startswith(without_thought_tags(prompt)):
        reasons.append("composed")
    question = turn.chat[-2]["content"] if len(turn.chat) > 1 else ""
    written = written_behind(prompt, rendered, question, layout.closing, thinks=bool(thought))
    if turn.chat[-1].get("tool_calls"):
        text = _with_calls(layout, prompt, written or "", thought)
        if not (_holds(text, answer) and _holds_calls(text, turn.chat[-1])):
            reasons.append("calls_lost")
    else:
        text, composed = _answered(layout, prompt, written, thought, answer)
        reasons += composed
    start = _answer_in(layout, turn, text, thought.strip(), answer.strip())
    masks = bool(thought) and encoder.thoughts == "mask"
    if start < 0 and (masks or turn.message.parts):
        raise TemplateRefusal(
            "it writes the answer in escapes, in which neither parts nor the end of a thought are found"
        )
    masked = text[:start] if masks else ""
    parts = [(prompt + text[:end], weight) for end, weight in _parts(encoder, turn.message, text, answer, start)]
    return Response(served, prompt + masked, parts, reasons)


def _answered(
    layout: TemplateLayout, prompt: str, written: str | None, thought: str, answer: str
) -> tuple[str, list[str]]:
    """Return a response without calls, and the reason `composed` if the template does not write it behind the prompt.

    A template without a key for thoughts may seem to write a short one, in other words. Kimi-K2-Thinking writes an
    empty thought in front of one in the content: '<think></think><think>\nSky'.
    """
    place = -1 if written is None else _place_behind(written, thought, answer)
    if written is None or place < 0 or (thought and (layout.key is None or closing_at_head(written))):
        return _begun(layout, prompt, thought) + answer + layout.ending, ["composed"]
    return _ended(written, place, {layout.end}, layout.ending), []


def _begun(layout: TemplateLayout, prompt: str, thought: str) -> str:
    """Return what we put between a prompt and the answer.

    Not every prompt opens a thought if most do: after a function's result some templates write none.
    """
    opened = opened_by(prompt)
    lead = layout.answer_lead if bool(opened) == layout.opens else layout.closing if opened else ""
    if opened and thought:
        return thought + layout.closing
    if thought:  # Kimi-K2-Thinking: '<think></think>' is in front of an answer without one
        return lead.removeprefix(closing_at_head(lead)) + layout.thought_tag + thought + layout.closing
    return lead


def _with_calls(layout: TemplateLayout, prompt: str, written: str, thought: str) -> str:
    """Return a response with calls, behind the thought, which EXAONE 4 leaves out there."""
    if not _holds(written, thought):
        written = _begun(layout, prompt, thought) + written.removeprefix(closing_at_head(written))
    return _ended(written, 0, {layout.call_end, layout.end}, layout.call_end)


def _ended(text: str, place: int, ends: set[str], ending: str) -> str:
    """Return a response through the first token that ends a turn from a place on; with `ending`, if there is none."""
    found = [text.index(end, place) + len(end) for end in ends if end in text[place:]]
    return text[: min(found)] if found else text.rstrip() + ending


def _answer_in(layout: TemplateLayout, turn: Turn, text: str, thought: str, answer: str) -> int:
    """Return where the answer begins in a response, or what is behind a thought without one; -1 if it is not found.

    A short one may also be in the template's own words (`hi` in `</think>`), so these are passed over.
    """
    tag = layout.thought_tag.strip()
    begin = text.index(tag) + len(tag) if text.lstrip().startswith(tag) else 0
    found = text.find(thought, begin)
    end = found + len(thought)
    if found < 0 or not answer:
        return end if found >= 0 else -1
    behind = end + len(closing_at_head(text[end:]))
    if turn.chat[-1].get("tool_calls"):
        return text.find(answer, behind)
    start = text.removesuffix(layout.ending).rfind(answer)
    return start if start >= behind else -1


def _place_behind(text: str, *parts: Any) -> int:
    """Return where parts that a text has, each behind the one before it, end; -1 if it has not all of them.

    parts  texts, and values as JSON or Python spells them
    """
    place = 0
    for part in parts:
        said = str(part).strip()
        spelt = json.dumps(said if isinstance(part, str) else [part], ensure_ascii=False)[1:-1]
        found = max(text.find(form, place) for form in (said, spelt))
        if found < 0:
            return -1
        place = found + len(said)
    return place


def _holds(text: str, part: Any) -> bool:
    return _place_behind(text, part) >= 0


def _holds_calls(text: str, turn: Mapping[str, Any]) -> bool:
    """True if a text has the names in a turn's calls, and the values of their arguments."""
    return all(_holds(text, part) for call in turn.get("tool_calls") or () for part in _values(call["function"]))


def _values(given: Any) -> list[Any]:
    """Return the texts, numbers, true, false and null in a value."""
    if isinstance(given, (list, Mapping)):
        values = given.values() if isinstance(given, Mapping) else given
        return [inner for value in values for inner in _values(value)]
    return [given]


def _left_out(layout: TemplateLayout, turn: Turn, prompt: str) -> list[str]:
    """Return what the template leaves out of the prompt: functions, calls, their results, other turns, options."""
    names = [str(tool.get("function", tool).get("name")) for tool in turn.tools]
    lost = set() if all(name in prompt for name in names) else {"tools_lost"}
    if not all(reads(layout.source, option) for option in turn.options):
        lost.add("option_unread")
    for other in turn.chat[:-1]:
        if not _holds_calls(prompt, other):
            lost.add("calls_lost")
        if other["role"] != "assistant" and not _holds(prompt, other["content"]):
            lost.add("tools_lost" if other["role"] == "tool" else "turn_lost")
    return sorted(lost)


def _parts(encoder: Encoder, message: Message, text: str, answer: str, start: int) -> list[tuple[int, float]]:
    """Return the ends in a response of the parts that have weights of their own, and these; else its own end.

    What is in front of the answer, a thought, has the weight of the turn.
    """
    end = start - (len(answer) - len(answer.lstrip()))
    parts = [(max(start, end), message.weight)] if message.thought and message.parts else []
    for part, weight in message.parts if start >= 0 else ():
        end += len(encoder.as_text(part))
        parts.append((max(start, end), weight * message.weight))
    return [*parts[:-1], (len(text), parts[-1][1] if parts else message.weight)]
