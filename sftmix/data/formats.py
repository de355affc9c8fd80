"""Row formats: each turns one row into one example, or says what is wrong with the row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftmix.common.fields import FORMAT_FIELDS, listed
from sftmix.common.shown import CONTROL, quoted
from sftmix.data.jsonrows import BadRow
from sftmix.types import Example, Message

RESERVED_ID = re.compile(r"@turn\d+$")
"""`<id>@turn<k>` names the example of the k-th assistant turn of a conversation with several."""

TEXT = "text"
"""The format of documents: text files, and rows with a field `text` and no field that another format reads."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    needs    fields by which a row of this format is recognised
    convert  row -> messages
    """

    needs: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], list[Message]]


def recognise(row: Mapping[str, Any], usual: str | None = None, first: Sequence[str] = ()) -> str:
    """Name the first format whose fields the row has; else `usual`, the format of the rows before it.

    first  formats that are tried before the others
    Raises BadRow if there is neither.
    """
    for name in (*first, *FORMATS):
        if all(need in row for need in (FORMATS[name].needs if name in FORMATS else (TEXT,))):
            return name
    if TEXT in row and not any(field in row for name in FORMATS for field in FORMAT_FIELDS[name]):
        return TEXT
    if usual is not None:
        return usual  # its conversion says which field is missing
    known = "; ".join([*(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items()), "text: text"])
    fields = listed(row)
    raise BadRow(
        f"format not recognised from the fields {fields} (known are {known}); name one with data.format, or say with "
        "data.columns which field is which",
        mistake="format not recognised",
    )


def convert(
    row: Any, name: str, *, source: str = "", label: str | None = None, label_field: str | None = None
) -> Example:
    """Read one row as format `name`; the id of a row without a field `id` is "". Raises BadRow.

    source       the row's place, `file:line`
    label        the label of the example, where no field of the row gives it
    label_field  None, or the field that gives the label
    """
    _object(row)
    if name == TEXT:
        raise BadRow("a text, where the rows before it are conversations; data.train and data.eval take one kind")
    for field in ("tools", "functions"):
        if isinstance(row.get(field), list) and row[field]:
            raise BadRow(f"field {field!r} lists tools, which are not supported")
    messages = _checked(_with_system(FORMATS[name].convert(row), row))
    return _example(row, messages, (*FORMAT_FIELDS[name], "system"), source, label, label_field)


def document(row: Any, *, source: str = "", label_field: str | None = None) -> tuple[Example, Iterable[str]]:
    """Read one row of plain text: an example without turns, and the text in pieces. Options are those of `convert`.

    Raises BadRow; the pieces of a text file may raise it, too.
    """
    _object(row)
    text = _field(row, TEXT)
    if isinstance(text, Iterator):  # a text file, which is never in memory as a whole
        if label_field is not None:
            raise BadRow(f"a text file has no field {label_field!r} (data.label_field)")
        return Example("", (), source), text
    return _example(row, (), (TEXT,), source, None, label_field), [checked_text(text, TEXT)]


def _example(
    row: Mapping[str, Any],
    messages: tuple[Message, ...],
    reads: Sequence[str],
    source: str,
    label: str | None,
    label_field: str | None,
) -> Example:
    used = {*reads, "id", label_field}
    columns = {key: value for key, value in row.items() if key not in used and _is_scalar(value)}
    for key, value in columns.items():
        checked_text(key, f"the name of the field {quoted(key)}")
        if isinstance(value, str):
            checked_text(value, f"field {quoted(key)}")
    return Example(_own_id(row), messages, source, label if label_field is None else _label(row, label_field), columns)


def _with_system(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """Put a row's own `system` field before its turns; every format may have one."""
    if row.get("system") in (None, ""):
        return messages
    if messages and messages[0].role == "system":
        raise BadRow("both a system field and a system turn")
    return [Message("system", checked_text(row["system"], "system")), *messages]


def _object(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with named fields, found {_kind(row)}")


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


def _own_id(row: Mapping[str, Any]) -> str:
    if "id" not in row:
        return ""
    text = checked_id(row["id"], "id")
    if RESERVED_ID.search(text):
        raise BadRow(f"id {quoted(text)} ends in @turn<number>, which is kept for the turns of a conversation")
    return text


def checked_id(value: Any, what: str) -> str:
    """Return an id, a whole number or a text that is a name; raise BadRow that says it of `what`."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _name(value, what)
    if not text.strip():
        raise BadRow(f"{what} is empty")
    return text


def _name(value: Any, what: str) -> str:
    """Return a text that is printed as a name; raise BadRow for one that could control a terminal."""
    if found := CONTROL.search(checked_text(value, what)):
        raise BadRow(f"{what} contains the control character {found[0]!r}")
    return str(value)


def _label(row: Mapping[str, Any], label_field: str) -> str | None:
    if label_field not in row:
        raise BadRow(f"field {label_field!r} (data.label_field) is missing")
    value = row[label_field]
    if value is None or isinstance(value, str):
        return value if value is None else _name(value, label_field)
    if not _is_scalar(value):
        raise BadRow(f"{label_field} (data.label_field) must be a scalar, found {_kind(value)}")
    return json.dumps(value)  # true, false, 1, 0.5: as YAML and JSON write them


# ------------------------------------------------------------------------------------------- the turns


def _checked(messages: list[Message]) -> tuple[Message, ...]:
    """Refuse turns in an order that no chat template is made for; drop a system message without text."""
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    expected = "user"
    for place, message in enumerate(messages):
        if message.role == "system" and place == 0:
            continue
        if message.role != expected:
            raise BadRow(f"turn {place + 1} is {message.role}'s, expected {expected}'s: turns must alternate from user")
        if message.role == "user" and not message.content.strip():
            raise BadRow(f"turn {place + 1} (user) is empty")
        expected = "assistant" if expected == "user" else "user"
    if not any(message.trained for message in messages):
        raise BadRow("no assistant turn to train on")
    return tuple(messages)


_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT = {**_ROLES, "human": "user", "gpt": "assistant"}
_ROLE_CONTENT = ("role", "content")


def _turns(
    row: Mapping[str, Any],
    what: str,
    names: Mapping[str, str] = _ROLES,
    keys: Sequence[tuple[str, str]] = (_ROLE_CONTENT,),
    trained: bool = True,
) -> list[Message]:
    """Read the field `what`, a list of {role: ..., content: ...} under one of the given pairs of keys."""
    value = _field(row, what)
    if not isinstance(value, list):
        raise BadRow(f"{what} must be a list of turns, found {_kind(value)}")
    if not value:
        raise BadRow(f"{what} is empty")
    messages = []
    for place, turn in enumerate(value):
        where = f"{what}[{place}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{where} must be an object, found {_kind(turn)}")
        role_key, content_key = next((pair for pair in keys if pair[0] in turn), keys[0])
        for key in (role_key, content_key):
            if key not in turn:
                raise BadRow(f"{where} has no {key!r}")
        role = names.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise BadRow(f"{where}.{role_key} is {quoted(turn[role_key])}; known are {', '.join(sorted(names))}")
        content = _content(turn[content_key], f"{where}.{content_key}")
        messages.append(Message(role, content, _counts(turn, where) and trained and role == "assistant"))
    return messages


def _counts(turn: Mapping[str, Any], where: str) -> bool:
    """Return False for a turn whose weight is 0; raise BadRow for other fields that change what a turn means."""
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise BadRow(f"{where} has {key}; calls of tools are not supported")
    if (weight := turn.get("weight")) not in (None, 0, 1):
        raise BadRow(f"{where}.weight is {quoted(weight)}; known are 0 (the turn is not trained) and 1")
    return weight != 0


def _content(value: Any, what: str) -> str:
    """Return the text of a turn: a string, or the texts of a list of parts {type: text, text: ...}, put together."""
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value) or not value:
        return checked_text(value, what)
    texts = []
    for place, part in enumerate(value):
        where = f"{what}[{place}]"
        for key in ("type", "text"):
            if part.get("type", "text") == "text" and key not in part:
                raise BadRow(f"{where} has no {key!r}")
        if part["type"] != "text":
            raise BadRow(f"{where} is a part of type {quoted(part['type'])}; only parts of type 'text' are read")
        texts.append(checked_text(part["text"], f"{where}.text"))
    return "".join(texts)


def _messages(row: Mapping[str, Any]) -> list[Message]:
    return _turns(row, "messages")


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    return _turns(row, "conversations", _SHAREGPT, (("from", "value"), _ROLE_CONTENT))


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction = checked_text(_field(row, "instruction"), "instruction")
    extra = checked_text(row.get("input", ""), "input")
    if not instruction.strip():
        raise BadRow("instruction is empty")
    prompt = f"{instruction}\n{extra}" if extra.strip() else instruction
    return [Message("user", prompt), Message("assistant", checked_text(_field(row, "output"), "output"), True)]


def _history(row: Mapping[str, Any]) -> list[Message]:
    history = _field(row, "history")
    if not isinstance(history, list):
        raise BadRow(f"history must be a list of [user, assistant] pairs, found {_kind(history)}")
    messages = []
    for place, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"history[{place}] must be a [user, assistant] pair")
        messages.append(Message("user", checked_text(pair[0], f"history[{place}][0]")))
        messages.append(Message("assistant", checked_text(pair[1], f"history[{place}][1]"), True))
    return messages + _alpaca(row)


def _prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = _field(row, "prompt"), _field(row, "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        return _turns(row, "prompt", trained=False) + _turns(row, "completion")
    return [
        Message("user", checked_text(prompt, "prompt")),
        Message("assistant", checked_text(completion, "completion"), True),
    ]


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "sharegpt": Format(("conversations",), _sharegpt),
    "history": Format(("instruction", "output", "history"), _history),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
}
"""The formats in the order in which they are recognised: history stands before alpaca, because it has its fields."""
