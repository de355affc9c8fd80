"""Row formats: each turns one row into one example, or says what is wrong with the row."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sftmix.common.fields import ANY_FORMAT, FORMAT_FIELDS, field_columns, formats_with, listed
from sftmix.common.plain import spelling
from sftmix.common.shown import CONTROL, quoted
from sftmix.data.calls import OPTIONS, TOOLS, tools_of, variables_of
from sftmix.data.turns import INSIDE, checked, is_parts, last_alone, turns_of, weight_of
from sftmix.data.values import BadRow, Fields, checked_text, field_text, filled, parsed, visible, without_null
from sftmix.types import Example, Message

RESERVED_ID = re.compile(r"@turn\d+$")
"""`<id>@turn<k>` names the example of the k-th assistant turn of a conversation with several."""

TEXT = "text"
"""The format of documents: text files, and rows with a field `text` and no field that another format reads."""

LISTS = {"messages", "conversations"}
"""Fields that are lists, which tables of text have as JSON."""

MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Fields of rows and turns that make a bad row if they say anything."""

PREFERRED = ("chosen", "chosen_messages")
REJECTED = ("rejected", "rejected_messages")
"""Fields of rows of preferences."""


_TWINS = dict([("weight", "loss_weight"), TOOLS])
"""Our fields and their other names in rows."""


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
        self.unread |= {other for ours, other in _TWINS.items() if ours in self.unread}
        self.formats = formats_with(self.names) if set(self.names) - set(ANY_FORMAT) else []
        self.present: dict[str, None] = {}

    def renamed(self, row: Any) -> Any:
        """Return the row under our names, without null, and remember its fields. Raises BadRow for what is none.

        A field takes the place of another of its name. A row without the column keeps its own field.
        """
        if not isinstance(row, Mapping):
            raise row if isinstance(row, BadRow) else BadRow(f"expected an object, found {quoted(row)}")
        self.present.update(dict.fromkeys(row))
        row = without_null(row)
        moved = {field: row[column] for field, column in self.names.items() if column in row}
        gone = {*self.names.values(), *self.unread}
        return {key: value for key, value in row.items() if key not in gone} | moved


def recognise(row: Fields, first: Sequence[str] = ()) -> str:
    """Name the first format whose fields the row has, or else the one of which it lacks fewest.

    History is before alpaca, whose fields it has. A row is text if it has no field that another format reads.

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
    roles: Mapping[str, str] | None = None,
    last: bool = False,
) -> Example:
    """Read one row, as `Columns.renamed` returns it; the id of a row without a field `id` is "". Raises BadRow.

    A document of plain text is one trained message of the role text.

    form         data.format; under auto, the row is a conversation in the format that its fields name
    first        formats that auto tries before the others
    source       the row's place, `file:line`
    label        the label of the example; None or empty: it has none
    label_field  None, or the field that the label is from
    unread       counts this row under the name of each of its fields that is not read
    roles        names of roles -> ours (data.roles)
    last         only the last of the assistant's turns is trained (data.trained_turns)
    """
    name = recognise(row, first) if form == "auto" else form
    if name == TEXT != form:
        raise BadRow("a text, where conversations are read; a run takes one kind")
    used = {*FORMAT_FIELDS[name], "id", label_field}
    row = {**row, **{key: parsed(row[key], key) for key in LISTS & row.keys() & used if isinstance(row[key], str)}}
    if name == TEXT:
        others = _unread(row, MEDIA, used, *INSIDE)
    else:
        _refuse_preferences(row, named=bool(first), label_field=label_field)
        used |= {"system", *TOOLS, OPTIONS}
        turns = {key: value for key, value in row.items() if key not in {*TOOLS, OPTIONS}}
        others = _unread(turns, MEDIA, {*used, "weight", "loss_weight"}, *INSIDE)
    try:
        messages = FORMATS[name](row, roles)
    except KeyError as field:
        problem = f"field {field} is missing or null; there are {listed(row)} (data.columns gives them other names)"
        raise BadRow(problem) from None
    label = None if label in (None, "") else _name(label, label_field or "data.labels")
    if name != TEXT:
        if row.get("system", "") != "":
            messages.insert(0, Message("system", field_text(row, "system")))
        weight = weight_of(row)
        messages = [replace(turn, weight=weight * turn.weight) for turn in messages]
        messages = checked(last_alone(messages) if last else messages)
    columns = {key: value for key, value in row.items() if key not in used and _is_scalar(value)}
    for key, value in columns.items():
        checked_text(f"{key}{value}", f"field {quoted(key)}")
    own_id = _name(row.get("id", ""), "id")
    if RESERVED_ID.search(own_id):
        raise BadRow(f"id {quoted(own_id)} ends in @turn<number>, which is kept for the turns of a conversation")
    if unread is not None:
        unread.update(sorted(others))
    if name == TEXT:
        return Example(own_id, tuple(messages), source, label, columns)
    return Example(own_id, tuple(messages), source, label, columns, tools_of(row), variables_of(row))


def _refuse_preferences(row: Fields, *, named: bool, label_field: str | None) -> None:
    """Raise BadRow for a row whose answer is one of two, or is called a bad one.

    named  data.columns says which fields are read
    """
    fields = [field for field in (*PREFERRED, *(() if named else REJECTED)) if filled(row.get(field))]
    if fields:
        raise BadRow(
            f"a row of preferences ({', '.join(fields)}), where one answer is trained: data.columns names it, as "
            "'{prompt: prompt, completion: chosen}', and leaves the other unread"
        )
    if label_field != "label" and spelling(row.get("label")) == "false":
        raise BadRow(
            "label is false, so its answer is a bad one: data.skip_bad drops such rows; data.label_field label keeps "
            "those of data.train"
        )


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
            single = [] if place else [value]  # a row's only turn needs no list
            for item in value if isinstance(value, list) else single:
                # what a function returned is read as a whole
                if isinstance(item, Mapping) and (key not in ("content", "value") or is_parts(value)):
                    names |= _unread(item, refused, *inside, place=f"{place}{key}[].")
        elif filled(value):
            if value and key in refused:
                raise BadRow(
                    f"{place}{key} is {quoted(value)}: images, videos and sound are not supported; remove the field "
                    "from rows that are complete without it"
                )
            names.add(quoted(place + key))
    return names


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def _name(value: Any, what: str) -> str:
    """Return an id or a label as text; it is printed."""
    text = checked_text(spelling(value) if _is_scalar(value) else value, what)
    if control := CONTROL.search(text):
        raise BadRow(f"{what} contains the control character {control[0]!r}")
    return text


# ------------------------------------------------------------------------------------------- the formats


def _alpaca(row: Fields, _: Mapping[str, str] | None = None) -> list[Message]:
    instruction = field_text(row, "instruction")
    extra = checked_text(row.get("input", ""), "input")
    if not visible(instruction):
        raise BadRow("instruction is empty")
    prompt = f"{instruction}\n{extra}" if visible(extra) else instruction
    return [Message("user", prompt), Message("assistant", field_text(row, "output"), True)]


def _history(row: Fields, _: Mapping[str, str] | None = None) -> list[Message]:
    history = row["history"] if filled(row.get("history")) else []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history must be a list of [user, assistant] pairs")
    messages = []
    for place, pair in enumerate(history):
        user, assistant = (checked_text(text, f"history[{place}]") for text in pair)
        messages += [Message("user", user), Message("assistant", assistant, True)]
    return messages + _alpaca(row)


def _prompt_completion(row: Fields, roles: Mapping[str, str] | None) -> list[Message]:
    """The prompt's turns, and the completion's behind them; the completion may repeat the prompt."""
    prompt, completion = (
        [Message(role, field_text(row, field), role == "assistant")]
        if isinstance(row[field], str)
        else turns_of(row[field], field, roles)
        for field, role in (("prompt", "user"), ("completion", "assistant"))
    )
    asked, said = ([(turn.role, turn.content) for turn in turns] for turns in (prompt, completion[: len(prompt)]))
    behind = completion[len(prompt) :] if said == asked else completion
    return [replace(turn, trained=False) for turn in prompt] + behind


FORMATS = {
    "messages": lambda row, roles: turns_of(row["messages"], "messages", roles),
    "sharegpt": lambda row, roles: turns_of(row["conversations"], "conversations", roles),
    "history": _history,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    TEXT: lambda row, _: [Message(TEXT, field_text(row, TEXT), True)],
}
"""Name of each format -> (row, data.roles) -> messages."""
