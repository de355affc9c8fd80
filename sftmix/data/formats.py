"""Row formats: each turns one row into one example, or says what is wrong with the row."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sftmix.common.errors import BadRow, ContractError
from sftmix.common.fields import ANY_FORMAT, FORMAT_FIELDS, field_columns, formats_with, listed
from sftmix.common.plain import spelling
from sftmix.common.row_format import RowFormat
from sftmix.common.shown import CONTROL, quoted
from sftmix.data.calls import TOOLS, tools_of
from sftmix.data.turns import INSIDE, checked, is_parts, last_alone, turns_of, weight_of
from sftmix.data.values import Fields, checked_text, field_of, field_text, filled, parsed, visible, without_null
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


@dataclass
class Converter:
    """Rows -> examples, in one format or each in the one that its fields name.

    columns      names of fields
    form         data.format; under auto, rows are conversations
    roles        data.roles
    label_field  None, or the field that labels are from
    last         only the last of the assistant's turns is trained (data.trained_turns)
    unread       fields that are not read, and in how many rows they are
    """

    columns: Columns
    form: RowFormat | str = "auto"
    roles: Mapping[str, str] | None = None
    label_field: str | None = None
    last: bool = False
    unread: Counter[str] = field(default_factory=Counter)

    def example(self, row: Fields, source: str = "", label: str | None = None) -> Example:
        """Read one row, as `Columns.renamed` returns it; the id of a row without a field `id` is "". Raises BadRow.

        A document of plain text is one trained message of the role text.

        source  the row's place, `file:line`
        label   the label of the example; None or empty: it has none
        """
        form = self._form_of(row)
        is_text = isinstance(form, PlainText)
        lists = [key for key in LISTS.intersection(form.turns) if isinstance(row.get(key), str)]
        row = {**row, **{key: parsed(row[key], key) for key in lists}}
        used = {*form.fields, "id", self.label_field}
        if is_text:
            unread = _unread(row, MEDIA, used, *INSIDE)
        else:
            self._refuse_preferences(row)
            used |= {"system", *TOOLS}
            whole = {*TOOLS, *form.fields}.difference(form.turns)
            looked_at = {key: value for key, value in row.items() if key not in whole}
            unread = _unread(looked_at, MEDIA, {*used, "weight", "loss_weight"}, *INSIDE)
        messages = form.read(row, roles=self.roles or {})
        label = None if label in (None, "") else _name(label, self.label_field or "data.labels")
        if not is_text:
            messages = self._with_row(messages, form, row)
        columns = {key: value for key, value in row.items() if key not in used and _is_scalar(value)}
        for key, value in columns.items():
            checked_text(f"{key}{value}", f"field {quoted(key)}")
        own_id = _name(row.get("id", ""), "id")
        if RESERVED_ID.search(own_id):
            raise BadRow(f"id {quoted(own_id)} ends in @turn<number>, which is kept for the turns of a conversation")
        self.unread.update(sorted(unread))
        tools = () if is_text else tools_of(row)
        return Example(own_id, tuple(messages), source, label, columns, tools)

    def _form_of(self, row: Fields) -> RowFormat:
        """Return the format of a row. Raises BadRow for a document where conversations are read."""
        if not isinstance(self.form, str):
            return self.form
        name = recognise(row, self.columns.formats) if self.form == "auto" else self.form
        if name == TEXT != self.form:
            raise BadRow("a text, where conversations are read; a run takes one kind")
        return FORMATS[name]

    def _refuse_preferences(self, row: Fields) -> None:
        """Raise BadRow for a row whose answer is one of two, or is called a bad one."""
        named = bool(self.columns.formats)  # data.columns says which fields are read
        fields = [name for name in (*PREFERRED, *(() if named else REJECTED)) if filled(row.get(name))]
        if fields:
            raise BadRow(
                f"a row of preferences ({', '.join(fields)}), where one answer is trained: data.columns names it, as "
                "'{prompt: prompt, completion: chosen}', and leaves the other unread"
            )
        if self.label_field != "label" and spelling(row.get("label")) == "false":
            raise BadRow(
                "label is false, so its answer is a bad one: data.skip_bad drops such rows; data.label_field label "
                "keeps those of data.train"
            )

    def _with_row(self, messages: Any, form: RowFormat, row: Fields) -> list[Message]:
        """Return the turns that a format has read, with the row's system turn and weight, if they are a conversation.

        Raises BadRow if they are none, ContractError for an answer that no format may give.
        """
        if not messages or any(not isinstance(turn, Message) for turn in messages):
            raise ContractError(
                f"data.format {form} returned {quoted(messages)}; allowed: a list of Message, not empty"
            )
        system = [Message("system", field_text(row, "system"))] if row.get("system", "") != "" else []
        weight = weight_of(row)
        messages = [replace(turn, weight=weight * turn.weight) for turn in [*system, *messages]]
        return checked(last_alone(messages) if self.last else messages)


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


class Messages(RowFormat):
    """A list of turns, {role: ..., content: ...} or {from: ..., value: ...}, in the field `messages`."""

    def __init__(self, *, field: str = "messages"):
        """field: its name; ShareGPT's is `conversations`."""
        self.field = field
        self.fields = self.turns = (field,)

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the turns of the list; see `turns_of`."""
        return turns_of(field_of(row, self.field), self.field, roles)


class Alpaca(RowFormat):
    """An instruction, an input for it or none, and an output."""

    fields = turns = FORMAT_FIELDS["alpaca"]

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the user's turn, with the input in its last line, and the assistant's."""
        instruction = field_text(row, "instruction")
        extra = checked_text(row.get("input", ""), "input")
        if not visible(instruction):
            raise BadRow("instruction is empty")
        prompt = f"{instruction}\n{extra}" if visible(extra) else instruction
        return [Message("user", prompt), Message("assistant", field_text(row, "output"), True)]


class History(Alpaca):
    """Alpaca's fields, and the earlier turns in pairs of texts, [user, assistant]."""

    fields = turns = FORMAT_FIELDS["history"]

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the earlier turns, whose answers are trained as well, and Alpaca's two."""
        history = row["history"] if filled(row.get("history")) else []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise BadRow("history must be a list of [user, assistant] pairs")
        messages = []
        for place, pair in enumerate(history):
            user, assistant = (checked_text(text, f"history[{place}]") for text in pair)
            messages += [Message("user", user), Message("assistant", assistant, True)]
        return messages + super().read(row, roles=roles)


class PromptCompletion(RowFormat):
    """A prompt and a completion, each a text, a turn or a list of turns; the completion may repeat the prompt."""

    fields = turns = FORMAT_FIELDS["prompt_completion"]

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the prompt's turns, none of them trained, and the completion's behind them."""
        prompt, completion = (
            [Message(role, field_text(row, name), role == "assistant")]
            if isinstance(field_of(row, name), str)
            else turns_of(row[name], name, roles)
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        asked, said = ([(turn.role, turn.content) for turn in turns] for turns in (prompt, completion[: len(prompt)]))
        behind = completion[len(prompt) :] if said == asked else completion
        return [replace(turn, trained=False) for turn in prompt] + behind


class PlainText(RowFormat):
    """A document without turns: one message of the role text, which data.format text alone chooses."""

    fields = turns = FORMAT_FIELDS[TEXT]

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the document."""
        return [Message(TEXT, field_text(row, TEXT), True)]


FORMATS: dict[str, RowFormat] = {
    "messages": Messages(),
    "sharegpt": Messages(field="conversations"),
    "history": History(),
    "alpaca": Alpaca(),
    "prompt_completion": PromptCompletion(),
    TEXT: PlainText(),
}
"""Our formats by the words of data.format."""
