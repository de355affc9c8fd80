"""Row formats: each turns one row into one example, or says what is wrong with the row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sftmix.common.fields import FORMAT_FIELDS, listed
from sftmix.common.shown import CONTROL, quoted
from sftmix.data.jsonrows import BadRow
from sftmix.types import Example, Message

RESERVED_ID = re.compile(r"@turn\d+$")
"""`<id>@turn<k>` names the example of the k-th assistant turn of a conversation with several."""

TEXT = "text"
"""The format of documents: text files, and rows with a field `text` and no field that another format reads."""

_NEEDS = {name: [field for field in fields if field != "input"] for name, fields in FORMAT_FIELDS.items()}
"""The fields by which the rows of each format are recognised. They are tried in this order: history stands before
alpaca, because it has its fields; text is last."""

_OF_TURNS = {field for name, fields in FORMAT_FIELDS.items() if name != TEXT for field in fields}


def recognise(row: Mapping[str, Any], usual: str | None = None, first: Sequence[str] = ()) -> str:
    """Name the first format whose fields the row has; else `usual`, the format of the rows before it.

    first  formats that are tried before the others
    Raises BadRow if there is neither.
    """
    for name in (*first, *_NEEDS):
        if name == TEXT and name not in first and _OF_TURNS & row.keys():
            continue
        if all(need in row for need in _NEEDS[name]):
            return name
    if usual is not None:
        return usual  # its conversion says which field is missing
    known = "; ".join(f"{name}: {', '.join(needs)}" for name, needs in _NEEDS.items())
    raise BadRow(
        f"format not recognised from the fields {listed(row)} (known are {known}); name one with data.format, or say "
        "with data.columns which field is which"
    )


def convert(
    row: Any, name: str, *, source: str = "", label: str | None = None, label_field: str | None = None
) -> Example:
    """Read one row as format `name`; the id of a row without a field `id` is "". Raises BadRow.

    A document of plain text is one trained message of the role text.

    source       the row's place, `file:line`
    label        the label of the example, where no field of the row gives it
    label_field  None, or the field that gives the label
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with named fields, found {_kind(row)}")
    if name != TEXT and any(row.get(field) for field in ("tools", "functions")):
        raise BadRow("it lists tools, which are not supported")
    messages, used = FORMATS[name](row), {*FORMAT_FIELDS[name], "id", label_field}
    if name != TEXT:
        if row.get("system") not in (None, ""):
            if messages and messages[0].role == "system":
                raise BadRow("both a system field and a system turn")
            messages.insert(0, Message("system", _text(row, "system")))
        messages, used = _checked(messages), {*used, "system"}
        if (weight := _weight(row, "weight")) == 0:
            raise BadRow("its weight is 0; leave the row out")
        messages = [replace(message, weight=weight * message.weight) for message in messages]
    columns = {key: value for key, value in row.items() if key not in used and _is_scalar(value)}
    for key, value in columns.items():
        checked_text(key, f"the name of the field {quoted(key)}")
        if isinstance(value, str):
            checked_text(value, f"field {quoted(key)}")
    if label_field is not None:
        label = _label(row, label_field)
    name = checked_id(row["id"], "id") if "id" in row else ""
    if RESERVED_ID.search(name):
        raise BadRow(f"id {quoted(name)} ends in @turn<number>, which is kept for the turns of a conversation")
    return Example(name, tuple(messages), source, label, columns)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, bool, int))


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"a number ({type(value).__name__})")


def checked_text(value: Any, what: str) -> str:
    """Return a value that is text for a model and for a file; raise BadRow that says it of `what`."""
    if not isinstance(value, str):
        raise BadRow(f"{what} must be a string, found {_kind(value)}")
    if "\0" in value:
        raise BadRow(f"{what} contains a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} contains a lone surrogate or bytes that are not UTF-8 (save the file as UTF-8)") from None
    return value


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(f"field {name!r} is missing")
    return row[name]


def _text(row: Mapping[str, Any], name: str) -> str:
    return checked_text(_field(row, name), name)


def checked_id(value: Any, what: str) -> str:
    """Return an id, a whole number or a text that is a name; raise BadRow that says it of `what`."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _name(value, what)
    if not text.strip():
        raise BadRow(f"{what} is empty")
    return text


def _name(value: Any, what: str) -> str:
    """Return a text that is printed as a name; raise BadRow for one that could control a terminal."""
    if control := CONTROL.search(checked_text(value, what)):
        raise BadRow(f"{what} contains the control character {control[0]!r}")
    return str(value)


def _label(row: Mapping[str, Any], label_field: str) -> str | None:
    value = _field(row, label_field)
    if isinstance(value, str):
        return _name(value, label_field)
    if not _is_scalar(value):
        raise BadRow(f"{label_field} (data.label_field) must be a scalar, found {_kind(value)}")
    return None if value is None else json.dumps(value)  # true, false, 1, 0.5: as YAML and JSON write them


# ------------------------------------------------------------------------------------------- the turns


def _checked(messages: list[Message]) -> list[Message]:
    """Refuse turns in an order that no chat template is made for; drop a system message without text."""
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    expected = "user"
    for number, message in enumerate(messages, start=1):
        if message.role == "system" and number == 1:
            continue
        if message.role != expected:
            raise BadRow(f"turn {number} is {message.role}'s, expected {expected}'s: turns must alternate from user")
        if message.role == "user" and not message.content.strip():
            raise BadRow(f"turn {number} (user) is empty")
        expected = "assistant" if expected == "user" else "user"
    if not any(message.trained for message in messages):
        raise BadRow("no assistant turn to train on")
    return messages


_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT = {**_ROLES, "human": "user", "gpt": "assistant"}


def _turns(row: Mapping[str, Any], what: str, names: Mapping[str, str] = _ROLES) -> list[Message]:
    """Read the field `what`, a list of {role: ..., content: ...}, or of {from: ..., value: ...}.

    names  role in the row -> ours
    """
    value = _field(row, what)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{what} must be a list of turns, found {_kind(value) if value else 'none'}")
    messages = []
    for place, turn in enumerate(value):
        where = f"{what}[{place}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{where} must be an object, found {_kind(turn)}")
        own_keys = names is _SHAREGPT and ("from" in turn or "role" not in turn)
        role_key, content_key = ("from", "value") if own_keys else ("role", "content")
        if content_key not in turn:
            raise BadRow(f"{where} has no {content_key!r}")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise BadRow(f"{where} calls a tool, which is not supported")
        weight = _weight(turn, f"{where}.weight")
        role = names.get(str(turn.get(role_key)))
        if role is None:
            raise BadRow(f"{where}.{role_key} is {quoted(turn.get(role_key))}; known are {', '.join(sorted(names))}")
        content = _content(turn[content_key], f"{where}.{content_key}")
        messages.append(Message(role, content, weight != 0 and role == "assistant", weight))
    return messages


def _weight(row: Mapping[str, Any], what: str) -> float:
    """Return the field `weight` of a row or turn; 1 if it has none."""
    value = row.get("weight")
    try:
        weight = float(1 if value in (None, "") else value)  # tables of text have "0.5"
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise BadRow(f"{what} is {quoted(value)}; allowed: a number from 0")
    return weight


def _content(value: Any, what: str) -> str:
    """Return the text of a turn: a string, or the texts of a list of parts {type: text, text: ...}, put together."""
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value) or not value:
        return checked_text(value, what)
    for place, part in enumerate(value):
        if part.get("type") != "text" or "text" not in part:
            shown = quoted(part.get("type"))
            raise BadRow(f"{what}[{place}] is a part of type {shown}; only parts of type 'text', with 'text', are read")
    return "".join(checked_text(part["text"], f"{what}[{place}].text") for place, part in enumerate(value))


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction = _text(row, "instruction")
    extra = checked_text(row.get("input", ""), "input")
    if not instruction.strip():
        raise BadRow("instruction is empty")
    prompt = f"{instruction}\n{extra}" if extra.strip() else instruction
    return [Message("user", prompt), Message("assistant", _text(row, "output"), True)]


def _history(row: Mapping[str, Any]) -> list[Message]:
    history = _field(row, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history must be a list of [user, assistant] pairs")
    messages = []
    for place, (user, assistant) in enumerate(history):
        messages.append(Message("user", checked_text(user, f"history[{place}][0]")))
        messages.append(Message("assistant", checked_text(assistant, f"history[{place}][1]"), True))
    return messages + _alpaca(row)


def _prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    if isinstance(_field(row, "prompt"), list) or isinstance(_field(row, "completion"), list):
        return [replace(turn, trained=False) for turn in _turns(row, "prompt")] + _turns(row, "completion")
    return [Message("user", _text(row, "prompt")), Message("assistant", _text(row, "completion"), True)]


FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": lambda row: _turns(row, "messages"),
    "sharegpt": lambda row: _turns(row, "conversations", _SHAREGPT),
    "history": _history,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    TEXT: lambda row: [Message(TEXT, _text(row, TEXT), True)],
}
"""Name of each format -> row -> messages."""
