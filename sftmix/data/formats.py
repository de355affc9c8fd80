"""Row formats: each turns one row into one example, or says what is wrong with the row."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sftmix.common.plain import ANY_FORMAT, FORMAT_FIELDS, field_columns, formats_with, listed, spelling
from sftmix.common.shown import CONTROL, quoted
from sftmix.types import Example, Message

Fields = Mapping[str, Any]
"""A row, or one of its turns: the names of its fields -> their values."""

RESERVED_ID = re.compile(r"@turn\d+$")
"""`<id>@turn<k>` names the example of the k-th assistant turn of a conversation with several."""

TEXT = "text"
"""The format of documents: text files, and rows with a field `text` and no field that another format reads."""

MEDIA = ("images", "image", "videos", "video", "audios", "audio")
NOT_SUPPORTED = (*MEDIA, "tools", "functions", "tool_calls", "function_call")
"""Fields of rows and turns that make a bad row if they say anything; in plain text those of MEDIA alone."""

INSIDE = (("role", "content", "from", "value", "weight"), ("type", "text"))
"""The fields that are read of a turn, and of a part of its content."""


class BadRow(ValueError):
    """Reason why a row cannot be used, for a message `file:line: reason`."""


class Columns:
    """Reader of rows whose fields have other names than ours (data.columns).

    names    our field -> its name in the rows; empty: the rows have our names
    unread   our fields that are not read (null in data.columns)
    formats  the formats that read all these fields, which data.format auto tries first
    present  names of the fields of the rows read so far, in their order
    """

    def __init__(self, columns: Mapping[str, str | None] | None) -> None:
        fields = field_columns(columns)
        self.names = {field: column for field, column in fields.items() if column is not None}
        self.unread = fields.keys() - self.names.keys()
        self.formats = formats_with(self.names) if set(self.names) - set(ANY_FORMAT) else []
        self.present: dict[str, None] = {}

    def renamed(self, row: Any) -> Any:
        """Return the row under our names, without null, and remember its fields. Raises BadRow for what is none.

        A field takes the place of another of its name. A row without the column keeps its own field.
        """
        if not isinstance(row, Mapping):
            raise row if isinstance(row, BadRow) else BadRow(f"expected an object, found {quoted(row)}")
        self.present.update(dict.fromkeys(row))
        row = _without_null(row)
        moved = {field: row[column] for field, column in self.names.items() if column in row}
        gone = {*self.names.values(), *self.unread}
        return {key: value for key, value in row.items() if key not in gone} | moved


def recognise(row: Fields, first: Sequence[str] = ()) -> str:
    """Name the first format whose fields the row has, or else the one of which it lacks fewest.

    History stands before alpaca, because it has its fields. A row is text if it has no field that another format reads.

    first  formats that are tried before the others
    Raises BadRow for a row without any of the fields.
    """
    near = [name for name in (*first, *FORMAT_FIELDS) if row.keys() & FORMAT_FIELDS[name]]
    if near:
        # A row with a text beside the fields of another format is of that one.
        return min(
            near,
            key=lambda name: (name == TEXT and TEXT not in first, len({*FORMAT_FIELDS[name]} - row.keys() - {"input"})),
        )
    known = "; ".join(", ".join(fields) for fields in FORMAT_FIELDS.values())
    raise BadRow(
        f"format not recognised from the fields {listed(row)} (known: {known}; data.columns gives them other names)"
    )


def convert(
    row: Fields,
    form: str,
    first: Sequence[str] = (),
    source: str = "",
    label: str | None = None,
    label_field: str | None = None,
    unread: Counter[str] | None = None,
) -> Example:
    """Read one row, as `Columns.renamed` returns it; the id of a row without a field `id` is "". Raises BadRow.

    A document of plain text is one trained message of the role text.

    form         data.format; under auto, the row is a conversation in the format that its fields name
    first        formats that auto tries before the others
    source       the row's place, `file:line`
    label        the label of the example, if no field of the row gives it
    label_field  None, or the field that gives the label; a row without it has none
    unread       counts this row under the name of each of its fields that is not read
    """
    name = recognise(row, first) if form == "auto" else form
    if name == TEXT != form:
        raise BadRow("a text, where conversations are read; a run takes one kind")
    used = {*FORMAT_FIELDS[name], "id", label_field}
    if name == TEXT:
        others = _unread(row, MEDIA, used, *INSIDE)
    else:
        used.add("system")
        others = _unread(row, NOT_SUPPORTED, {*used, "weight"}, *INSIDE)
    try:
        messages = FORMATS[name](row)
    except KeyError as field:
        problem = f"field {field} is missing or null; there are {listed(row)} (data.columns gives them other names)"
        raise BadRow(problem) from None
    if label_field:
        label = row.get(label_field)
    if label is not None:
        label = _name(label, label_field or "data.labels")
    if name != TEXT:
        if row.get("system", "") != "":
            messages.insert(0, Message("system", _text(row, "system")))
        weight = _weight(row, "weight")
        messages = _checked([replace(turn, weight=weight * turn.weight) for turn in messages])
    columns = {key: value for key, value in row.items() if key not in used and _is_scalar(value)}
    for key, value in columns.items():
        _checked_text(f"{key}{value}", f"field {quoted(key)}")
    own_id = _name(row.get("id", ""), "id")
    if RESERVED_ID.search(own_id):
        raise BadRow(f"id {quoted(own_id)} ends in @turn<number>, which is kept for the turns of a conversation")
    if unread is not None:
        unread.update(sorted(others))
    return Example(own_id, tuple(messages), source, label, columns)


def _unread(
    fields: Fields, refused: Collection[str], read: Collection[object] = (), *inside: Collection[str], place: str = ""
) -> set[str]:
    """Name the fields that say something and are not read, of a row and of its turns: `source`, `messages[].name`.

    refused       the names of fields that make a bad row; raises BadRow
    read, inside  the names that are read: of these fields, of the objects in their lists, of those in theirs
    """
    names = set()
    for key, value in fields.items():
        if key in read:
            for item in value if isinstance(value, list) else ():
                if isinstance(item, Mapping):
                    names |= _unread(item, refused, *inside, place=f"{place}{key}[].")
        elif _filled(value):
            if value and key in refused:
                raise BadRow(
                    f"{place}{key} is {quoted(value)}: tools, images, videos and sound are not supported; remove the "
                    "field from rows that are complete without it"
                )
            names.add(quoted(place + key))
    return names


def _without_null(fields: Fields) -> Fields:
    """Return the fields that have a value: tables have null, or NaN, for those that a row or a turn lacks."""
    return {key: value for key, value in fields.items() if value is not None and value == value}


def _filled(value: Any) -> bool:
    """False for null and empty text, as tables of text spell them, too, and for lists and objects of nothing else."""
    rest = [value]
    for item in rest:  # which grows: a row may be nested too deeply for recursion
        if isinstance(item, (list, Mapping)):
            rest += item.values() if isinstance(item, Mapping) else item
        elif str(item).strip() not in ("", "null", "None", "nan", "[]", "{}"):
            return True
    return False


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def _name(value: Any, what: str) -> str:
    """Return an id or a label as text; it is printed."""
    text = _checked_text(spelling(value) if _is_scalar(value) else value, what)
    if control := CONTROL.search(text):
        raise BadRow(f"{what} contains the control character {control[0]!r}")
    return text


def _text(row: Fields, name: str) -> str:
    return _checked_text(row[name], name)


def _checked_text(value: Any, what: str) -> str:
    """Return a value that is text for a model and for a file; raise BadRow that says it of `what`."""
    if not isinstance(value, str):
        raise BadRow(f"{what} must be a string, found {quoted(value)}")
    if "\0" in value:
        raise BadRow(f"{what} contains a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} contains a lone surrogate or bytes that are not UTF-8 (save the file as UTF-8)") from None
    return value


# ------------------------------------------------------------------------------------------- the turns


def _checked(messages: list[Message]) -> list[Message]:
    """Refuse turns in an order that no chat template is made for; drop a system message without text."""
    if messages[0].role == "system" and not messages[0].content.strip():
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
    if not any(message.trained and message.weight for message in messages):
        raise BadRow("no assistant turn to train on, or none with a weight above 0")
    return messages


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _turns(row: Fields, field: str) -> list[Message]:
    """Read a list of {role: ..., content: ...} or {from: ..., value: ...}."""
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{field} must be a list of turns, found {quoted(turns)}")
    messages = []
    for place, turn in enumerate(turns):
        where = f"{field}[{place}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{where} must be an object, found {quoted(turn)}")
        turn = _without_null(turn)
        role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise BadRow(f"{where}.{role_key} is {quoted(turn.get(role_key))}; known are {', '.join(_ROLES)}")
        weight = _weight(turn, f"{where}.weight")
        if content_key not in turn:
            raise BadRow(f"{where} has no {content_key!r}, or null")
        content, what = turn[content_key], f"{where}.{content_key}"
        if isinstance(content, list):  # of parts, whose texts are put together
            for number, part in enumerate(content):
                if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise BadRow(
                        f"{what}[{number}] is {quoted(part)}; only parts of type 'text', with 'text', are read"
                    )
            content = "".join(part["text"] for part in content)
        content = _checked_text(content, what)
        messages.append(Message(role, content, weight != 0 and role == "assistant", weight))
    return messages


def _weight(row: Fields, what: str) -> float:
    """Return the field `weight` of a row or turn; 1 if it has none."""
    value = row.get("weight", 1)
    try:
        weight = float(1 if value == "" else value)  # tables of text have "0.5"
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise BadRow(f"{what} is {quoted(value)}; allowed: a number from 0")
    return weight


def _alpaca(row: Fields) -> list[Message]:
    instruction = _text(row, "instruction")
    extra = _checked_text(row.get("input", ""), "input")
    if not instruction.strip():
        raise BadRow("instruction is empty")
    prompt = f"{instruction}\n{extra}" if extra.strip() else instruction
    return [Message("user", prompt), Message("assistant", _text(row, "output"), True)]


def _history(row: Fields) -> list[Message]:
    history = row["history"] if _filled(row.get("history")) else []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history must be a list of [user, assistant] pairs")
    messages = []
    for place, pair in enumerate(history):
        user, assistant = (_checked_text(text, f"history[{place}]") for text in pair)
        messages += [Message("user", user), Message("assistant", assistant, True)]
    return messages + _alpaca(row)


def _prompt_completion(row: Fields) -> list[Message]:
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        return [replace(turn, trained=False) for turn in _turns(row, "prompt")] + _turns(row, "completion")
    return [Message("user", _text(row, "prompt")), Message("assistant", _text(row, "completion"), True)]


FORMATS = {
    "messages": lambda row: _turns(row, "messages"),
    "sharegpt": lambda row: _turns(row, "conversations"),
    "history": _history,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    TEXT: lambda row: [Message(TEXT, _text(row, TEXT), True)],
}
"""Name of each format -> row -> messages."""
