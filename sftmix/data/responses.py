"""A trained turn as text: the prompt that the model is served with, and the response that it is to write behind it."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sftmix.data.encoder import Encoder
from sftmix.data.fitting import Shape
from sftmix.data.rendering import behind_head
from sftmix.data.templates import TemplateRefusal, reads
from sftmix.data.thoughts import opened_by
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
    turns = [list(_trained(encoder, example)) for example in examples]
    flat = [turn for of_example in turns for turn in of_example]
    prompts = _rendered(encoder, flat, prompt=True)
    closed = _rendered(encoder, flat, prompt=False)
    found = iter(_response(encoder, *of_turn) for of_turn in zip(flat, prompts, closed, strict=True))
    return [[next(found) for _ in of_example] for of_example in turns]


def _trained(encoder: Encoder, example: Example) -> Iterator[Turn]:
    """Yield the trained turns of an example."""
    chat = encoder.turns(example.messages)
    tools = encoder.as_text(example.tools)
    for place, message in enumerate(example.messages):
        if message.trained:
            own = encoder.turn(message, inline=True) if message.thought else chat[place]
            yield Turn(message, [*chat[:place], own], tools, example.options)


def _rendered(encoder: Encoder, turns: Sequence[Turn], *, prompt: bool) -> list[str]:
    """Render what is in front of each turn, with the generation prompt, or the conversation through it."""
    groups = defaultdict[str, list[int]](list)
    for number, turn in enumerate(turns):
        groups[json.dumps([turn.tools, turn.options]) if turn.tools or turn.options else ""].append(number)
    texts = [""] * len(turns)
    for numbers in groups.values():
        first = turns[numbers[0]]
        chats = [turns[n].chat[:-1] if prompt else turns[n].chat for n in numbers]
        rendered = encoder.render(chats, prompt=prompt, tools=first.tools, **first.options)
        for number, text in zip(numbers, rendered, strict=True):
            texts[number] = text
    return texts


def _response(encoder: Encoder, turn: Turn, prompt: str, closed: str) -> Response:
    """Put a response behind its prompt, as the template writes it, or else from its parts."""
    shape = encoder.shape
    assert shape is not None
    thought, answer = map(encoder.as_text, encoder.divided(turn.message))
    headed = behind_head(prompt, closed, turn.chat[-2]["content"] if len(turn.chat) > 1 else "")
    before = _lead(shape, prompt, thought=bool(thought)) + (thought + shape.closing if thought else "")
    text = _behind(shape, prompt, headed, thought=bool(thought))
    reasons = _lost(turn, prompt) + ["composed"] * (headed != closed)
    if not all(reads(shape.source, option) for option in turn.options):
        reasons.append("option_unread")
    if calls := turn.chat[-1].get("tool_calls"):
        if thought and (text is None or not _holds(text, thought)):
            text = (_behind(shape, prompt, headed, thought=False) or "").removeprefix(shape.plain.served)
            text = text if _holds(text, thought) else before + text
        if text is None or not (
            _holds(text, answer) and all(_holds(text, part) for part in _values([call["function"] for call in calls]))
        ):
            reasons.append("calls_lost")
        text = _ended(shape, text or "")
    else:
        if text is not None:
            text = text[: text.rindex(shape.ending)] if shape.ending in text else text.rstrip()
            text += shape.ending
        whole = before + answer + shape.ending
        drops = bool(thought) and shape.key is None  # its rendering may hold a short thought by chance
        if text is None or not _holds(text, thought, answer) or (drops and text.split() != whole.split()):
            text = whole
            reasons.append("composed")
    served = encoder.render([turn.chat[:-1]], prompt=True, tools=turn.tools)[0] if turn.options else prompt
    thought_end, start = _places(shape, prompt, text, thought, answer, calls=bool(calls))
    masks = thought and encoder.thoughts == "mask"
    if start < 0 and (masks or turn.message.parts):
        raise TemplateRefusal(
            "it writes the answer in escapes, in which neither parts nor the end of a thought are found"
        )
    masked = text[: start if answer.strip() else thought_end] if masks else ""
    parts = [(prompt + text[:end], weight) for end, weight in _parts(encoder, turn.message, text, answer, start)]
    return Response(served, prompt + masked, parts, reasons)


def _lead(shape: Shape, prompt: str, *, thought: bool) -> str:
    """Return what is written behind a prompt before the answer, or before the thought.

    Not every prompt opens a thought if most do: after a function's result some templates write none.
    """
    opened = opened_by(prompt)
    if bool(opened) == bool(shape.opened):
        return (shape.thinking if thought else shape.plain).served
    return shape.opened if thought else ""


def _behind(shape: Shape, prompt: str, closed: str, *, thought: bool) -> str | None:
    """Return what the template writes behind the prompt, from there on; None if it does not go on from the prompt."""
    own = (shape.thinking if thought else shape.plain).own
    surplus = shape.surplus
    lead = _lead(shape, prompt, thought=thought)
    if own is not None and surplus is not None and prompt.endswith(surplus) and opened_by(prompt) == shape.opened:
        begin = prompt[: len(prompt) - len(surplus)] + own
        if closed.startswith(begin):
            return lead + closed[len(begin) :]
    if closed.startswith(prompt):
        return closed[len(prompt) :]
    opened = opened_by(prompt)
    begin = prompt.removesuffix(opened)
    if not closed.startswith(begin):
        return None
    rest = closed[len(begin) :].removeprefix(opened.strip())  # the prompt has it already
    return (lead if closed == begin + rest else "") + (rest.lstrip() if thought else rest)


def _holds(text: str, *parts: Any) -> bool:
    """True if a text has all parts, each behind the one before it: texts, and values as JSON or Python spells them."""
    place = 0
    for part in parts:
        said = str(part).strip()
        spelt = json.dumps(said if isinstance(part, str) else [part], ensure_ascii=False)[1:-1]
        found = max(text.find(form, place) for form in (said, spelt))
        if found < 0:
            return False
        place = found + len(said)
    return True


def _values(calls: Any) -> list[Any]:
    """Return the names in calls, and the texts, numbers, true, false and null in their arguments."""
    if isinstance(calls, (list, Mapping)):
        values = calls.values() if isinstance(calls, Mapping) else calls
        return [inner for value in values for inner in _values(value)]
    return [calls]


def _lost(turn: Turn, prompt: str) -> list[str]:
    """Return what the template leaves out of the prompt: functions, their results, other turns."""
    names = [str(tool.get("function", tool).get("name")) for tool in turn.tools]
    lost = set()
    if not all(name in prompt for name in names):
        lost.add("tools_lost")
    for other in turn.chat[:-1]:
        if other["role"] != "assistant" and not _holds(prompt, other["content"]):
            lost.add("tools_lost" if other["role"] == "tool" else "turn_lost")
    return sorted(lost)


def _ended(shape: Shape, text: str) -> str:
    """Return a response with calls through the first token that ends a turn, which is put there if there is none."""
    ends = [text.index(end) + len(end) for end in {shape.call_end, shape.end} if end in text]
    return text[: min(ends)] if ends else text.rstrip() + shape.call_end


def _places(shape: Shape, prompt: str, text: str, thought: str, answer: str, *, calls: bool) -> tuple[int, int]:
    """Return where a response's thought ends and where its answer begins; -1 for an answer that it does not hold.

    A short one may also be in the template's own words (`hi` in `</think>`), so these are passed over.
    """
    thought, answer, lead = thought.strip(), answer.strip(), _lead(shape, prompt, thought=bool(thought))
    begin = len(lead) if text.startswith(lead) else 0
    found = text.find(thought, begin)
    if found < 0:
        return begin, -1
    end = found + len(thought)
    behind = end + len(shape.closing) if thought and text.startswith(shape.closing, end) else end
    if calls:
        return end, text.find(answer, behind)
    start = text.removesuffix(shape.ending).rfind(answer)
    return end, start if start >= behind else -1


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
