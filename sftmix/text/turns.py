"""The turns of a conversation: roles, contents and their parts, thoughts, and flags that say what is trained."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sftmix.text.calls import CALL_FIELDS, TOOLS, call_answered, calls_of
from sftmix.text.thoughts import THOUGHT_FIELDS, divided
from sftmix.text.values import BadRow, Fields, checked_text, filled, parsed, without_null
from sftmix.types import Message
from sftmix.words.fields import CALL_ROLE, ROLES
from sftmix.words.given import spelling
from sftmix.words.shown import quoted, visible

_ON = {"true": True, "1": True, "false": False, "0": False}
FLAGS = {
    **dict.fromkeys(("train", "training", "trainable", "loss", "loss_mask", "mask"), _ON),  # axolotl: the first two
    "masked": {value: not trained for value, trained in _ON.items()},
}
"""Flags of a turn or a part -> their values -> it is trained."""

FOLLOWS = {
    "": ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""A role, "" for none -> the roles of the turn behind it."""

PART_TYPES = ("text", "image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")
"""Types of the parts of a content. Only text is read."""
REMEDY = "write turns as {role: ..., content: ...}; data.roles adds roles, data.columns names the fields of rows alone"
TURN_FIELDS = ("weight", "loss_weight", "name", "tool_call_id", *THOUGHT_FIELDS, *CALL_FIELDS, *FLAGS)
"""The fields that are read of a turn, beside its role and its content."""


def keys_of(turn: Fields) -> tuple[str, str]:
    """Return the fields with the role and the content of a turn without null: a list may have turns of both kinds."""
    return ("role", "content") if "role" in turn else ("from", "value")


def checked(messages: list[Message]) -> list[Message]:
    """Refuse turns in an order that no chat template is made for; drop a system message without text."""
    if messages[0].role == "system" and not visible(messages[0].content):  # ShareGPT: {"from": "system", "value": ""}
        messages = messages[1:]
    before = ""
    for number, message in enumerate(messages, start=1):
        if message.role not in FOLLOWS[before]:
            expected = " or ".join(f"{role}'s" for role in FOLLOWS[before])
            raise BadRow(f"turn {number} is {message.role}'s, expected {expected}: turns must alternate from user")
        if message.role == "user" and not visible(message.content):
            raise BadRow(f"turn {number} (user) is empty")
        before = message.role
    if not any(message.trained and message.weight for message in messages):
        raise BadRow("no assistant turn to train on, or none with a weight above 0")
    return messages


def last_alone(messages: list[Message]) -> list[Message]:
    """Return the turns, of which only the last one of the assistant may be trained."""
    final = max((place for place, turn in enumerate(messages) if turn.role == "assistant"), default=-1)
    return [replace(turn, trained=turn.trained and place == final) for place, turn in enumerate(messages)]


def turns_of(value: Any, field: str, roles: Mapping[str, str] | None = None) -> list[Message]:
    """Read a list of {role: ..., content: ...} or {from: ..., value: ...}, or a single one.

    roles  names of roles -> ours (data.roles), beside ROLES
    """
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{field} must be a list of turns, found {quoted(turns)}")
    known = {**ROLES, **(roles or {})}
    messages = []
    waiting: list[dict[str, Any]] | None = None
    for place, given in enumerate(turns):
        where = f"{field}[{place}]"
        turn = without_null(given) if isinstance(given, Mapping) else {}
        role_key, content_key = keys_of(turn)
        role = known.get(str(turn.get(role_key)))
        if role is None:
            named = f"{where}.{role_key} is {quoted(turn.get(role_key))} in {quoted(given)}"
            raise BadRow(f"{named}; known: {', '.join(known)}; {REMEDY}")
        if any(filled(turn.get(name)) for name in TOOLS):  # OLMo 3's rows have them in the system turn
            raise BadRow(f"{where} lists functions; they are the row's, in a field `tools`")
        message = _message(turn, role, turn.get(content_key), where, place)
        if content_key not in turn and not message.more:
            raise BadRow(f"{where} has no {content_key!r}, or null")
        if role == "tool":
            message = replace(message, more=call_answered(turn, waiting, where))
        else:
            waiting = [*message.more.get("tool_calls", [])] or None
        messages.append(message)
    return messages


def _message(turn: Fields, role: str, content: Any, where: str, place: int) -> Message:
    """Read one turn, with its calls and its thought."""
    more = calls_of(turn, content if role == CALL_ROLE else None, where, place)
    if role == CALL_ROLE:  # glaive_toolcall_en: {"from": "function_call", "value": "{...}"}
        role, content = "assistant", ""
    thought = _thought(turn, where)
    if role != "assistant" and (more or thought):
        raise BadRow(f"{where} has a thought or a call of a function, and is {role}'s, not the assistant's")
    weight = _weight(turn, where, role)
    parts = _parts(content, f"{where}.content", role)
    text = "".join(part for part, _ in parts)
    shares = {share for _, share in parts}
    if len(shares) == 1:  # one weight for the whole content, as for a text
        weight *= shares.pop()
        parts = []
    # A thought in the content alone stays there: the template decides what it is (ChatTemplate.turn).
    inline, answer = divided(text) if thought or parts else ("", text)
    if parts and answer != text:  # their weights are of its characters
        raise BadRow(
            f"{where} has a thought in a content whose parts have flags or weights; put it into {THOUGHT_FIELDS[0]}"
        )
    if inline and inline != thought.strip():
        raise BadRow(f"{where} has one thought in a field and another in its content; leave one out")
    return Message(role, answer, weight != 0 and role == "assistant", weight, thought, more, tuple(parts))


def is_parts(content: Any) -> bool:
    """True for the parts of a content; any other list is what a function returned, whose objects may have types."""
    parts = content if isinstance(content, list) else []  # [{"type": "museum", "name": "Munch"}] is a result
    return bool(parts) and all(isinstance(part, Mapping) and part.get("type") in PART_TYPES for part in parts)


def _parts(content: Any, what: str, role: str) -> list[tuple[str, float]]:
    """Return the texts of a content, each with its weight; a text is one part."""
    if role == "tool" and not isinstance(content, str) and not is_parts(content):
        content = json.dumps(parsed(content, what), ensure_ascii=False)  # {"sum": [2]} -> '{"sum": [2]}'
    parts = []
    whole = [{"type": "text", "text": "" if content is None else content}]
    for number, part in enumerate(content if isinstance(content, list) else whole):
        where = f"{what}[{number}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise BadRow(f"{where} is {quoted(part)}; only parts of type 'text', with 'text', are read")
        given = [part[key] for key in ("text", "content", "value") if part.get(key) is not None]
        if any(text != given[0] for text in given):
            raise BadRow(f"{where} is {quoted(part)}: several fields have its text, and differ; leave all but one out")
        text = checked_text(given[0] if given else None, where if isinstance(content, list) else what)
        parts.append((text, _weight(without_null(part), where, role)))
    return parts


def _thought(turn: Fields, where: str) -> str:
    """Return the thought of a turn, which several fields may hold; "" if it has none."""
    said = dict[str, str]()
    for name in THOUGHT_FIELDS:
        text = checked_text(turn.get(name) or "", f"{where}.{name}")
        if text.strip():
            said[text] = name  # by its text: fields that say the same are one thought
    if len(said) > 1:
        raise BadRow(f"{where} has different thoughts in {' and '.join(said.values())}; leave one out")
    return next(iter(said), "")


# ------------------------------------------------------------------------------------------- flags


def _weight(fields: Fields, where: str, role: str) -> float:
    """Return the weight of a turn or a part, 0 if a flag says that it is not trained; 1 if it has none.

    Raises BadRow for flags that contradict each other or the weight, or ask for a turn that is not the assistant's.
    """
    weight = weight_of(fields, f"{where}.")
    said = set[bool]()
    for name in FLAGS.keys() & fields.keys():
        value = spelling(fields[name])  # True, "TRUE" -> true; 1.0 -> 1
        if value not in FLAGS[name]:
            raise BadRow(f"{where}.{name} is {quoted(fields[name])}; allowed: {', '.join(FLAGS[name])}")
        said.add(FLAGS[name][value])
    if len(said) > 1 or (True in said and (not weight or role != "assistant")):
        flags = {name: fields[name] for name in (*FLAGS, "weight") if name in fields}
        raise BadRow(
            f"{where} ({role}) has {quoted(flags)}: flags must agree, and only the assistant's turns are trained"
        )
    return 0.0 if False in said else weight


MOST_WEIGHT = 1e6
"""Most of a row, of a turn and of a part, which are multiplied: float32, in which losses are added, ends at 3.4e38."""


def weight_of(row: Fields, where: str = "") -> float:
    """Return the weight of a row, a turn or a part; 1 if it has none."""
    value = row.get("weight", row.get("loss_weight", 1))  # OpenAI: "weight": 0, or 1
    if value not in (row.get("loss_weight", value),):  # by identity first: NaN, which is refused below
        raise BadRow(f"{where}weight is {quoted(value)}, and loss_weight {quoted(row['loss_weight'])}; leave one out")
    try:
        weight = float(1 if value == "" else value)  # tables of text have "0.5"
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= MOST_WEIGHT:
        raise BadRow(f"{where}weight is {quoted(value)}; allowed: a number from 0 to {MOST_WEIGHT:g}")
    return weight
