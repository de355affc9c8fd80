"""Row formats: each turns one row into one example, or says what is wrong with the row."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sftmix.components.row_format import RowFormat
from sftmix.text.calls import TOOLS, tools_of
from sftmix.text.turns import TURN_FIELDS, checked, keys_of, last_alone, turns_of, weight_of
from sftmix.text.values import Fields, checked_text, field_of, field_text, filled, parsed, visible, without_null
from sftmix.types import Example, Message
from sftmix.words.errors import BadRow, ContractError
from sftmix.words.fields import ANY_FORMAT, FORMAT_FIELDS, RESERVED_ID, TEXT, field_columns, listed
from sftmix.words.given import spelling
from sftmix.words.shown import CONTROL, quoted

LISTS = {"messages", "conversations"}
"""Fields that are lists, which tables of text have as JSON."""

# history: LLaMA-Factory's [[question, answer], ...], without which a row of LIMA begins in the middle.
REFUSED = ("images", "image", "videos", "video", "audios", "audio", "history")
"""Fields of rows and turns that make a bad row if they say anything."""


_TWINS = dict([("weight", "loss_weight"), TOOLS])  # {"weight": "loss_weight", "tools": "functions"}
"""Our fields and their other names in rows."""

WEIGHTS = {"weight", "loss_weight"}
"""Fields that are read, and are columns as well."""


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
        own = self.names.keys() - {*ANY_FORMAT}
        # {prompt: question, response: answer} -> ["prompt_completion"]; {id: key}: none is preferred
        self.formats = [name for name, reads in FORMAT_FIELDS.items() if own and own <= {*reads}]
        self.present: dict[str, None] = {}

    def renamed(self, row: Any) -> Any:
        """Return the row under our names, without null, and remember its fields. Raises BadRow for what is none.

        A field takes the place of another of its name, also if it is null. A row without the column keeps its own
        field.
        """
        if not isinstance(row, Mapping):
            raise row if isinstance(row, BadRow) else BadRow(f"expected an object, found {quoted(row)}")
        self.present.update(dict.fromkeys(row))
        named = {field: row[column] for field, column in self.names.items() if column in row}
        gone = {*self.names.values(), *self.unread}  # {messages: chosen}: `chosen` is not reported as not read
        return without_null({key: value for key, value in row.items() if key not in gone} | named)


def recognise(row: Fields, first: Sequence[str] = ()) -> str:
    """Name the first format of conversations whose fields the row has, or else the one of which it lacks fewest.

    first  formats that are tried before the others
    Raises BadRow for a row without any of the fields.
    """
    near = [name for name in (*first, *FORMAT_FIELDS) if name != TEXT and row.keys() & FORMAT_FIELDS[name]]
    if near:  # ultrachat_200k has messages, and prompt without completion
        return min(near, key=lambda name: len({*FORMAT_FIELDS[name]} - row.keys() - {"input"}))
    known = "; ".join(", ".join(fields) for fields in FORMAT_FIELDS.values())
    raise BadRow(
        f"format not recognised from the fields {listed(row)} (known: {known}, which data.format text reads; "
        f"data.columns gives them other names){_of_rows(row)}"
    )


def _of_rows(row: Fields) -> str:
    """Say what to do with an object that holds a list of rows; "" for any other."""
    fields = sum(FORMAT_FIELDS.values(), ())
    for name, value in row.items():  # {"version": "1.0", "data": [{"instruction": "Hi", "output": "Yo"}]}
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0].keys() & fields:
            return f". One object is one row: if the rows are those of {quoted(name)}, write that list alone, [...]"
    return ""


@dataclass
class Converter:
    """Rows -> examples, in one format or each in the one that its fields name.

    columns      names of fields
    form         a row format, or a word of data.format; under auto, rows are conversations
    roles        data.roles
    label_field  None, or the field that labels are from
    last         only the last of the assistant's turns is trained (data.trained_turns)
    unread       fields that are not read, and in how many rows they are
    skipped      fields of the last row that are not read
    """

    columns: Columns
    form: RowFormat | str = "auto"
    roles: Mapping[str, str] | None = None
    label_field: str | None = None
    last: bool = False
    unread: Counter[str] = field(default_factory=Counter)
    skipped: Sequence[str] = ()

    def example(self, row: Fields, source: str = "", label: str | None = None) -> Example:
        """Read one row, as `Columns.renamed` returns it; the id of a row without a field `id` is "". Raises BadRow.

        A document of plain text is one trained message of the role text.

        source  the row's place, `file:line`
        label   the label of the example; None or empty: it has none
        """
        form, row = self._fields(row)
        read = {*form.fields, *form.shared, "id", self.label_field}
        self.skipped = sorted(_unread(row, read, form.turns))
        messages = form.read({**row}, roles=self.roles or {})
        if form.shared:
            messages = self._with_row(messages, form, row)
        label = None if label in (None, "") else _name(label, self.label_field or "data.labels")
        columns = {key: value for key, value in row.items() if key not in read - WEIGHTS and _is_scalar(value)}
        for key, value in columns.items():
            checked_text(f"{key}{value}", f"field {quoted(key)}")
        own_id = _name(row.get("id", ""), "id")
        if RESERVED_ID.search(own_id):
            raise BadRow(f"id {quoted(own_id)} ends in @turn<number>, which is kept for the turns of a conversation")
        self.unread.update(self.skipped)
        return Example(own_id, tuple(messages), source, label, columns, tools_of(row) if form.shared else ())

    def _fields(self, row: Fields) -> tuple[RowFormat, Fields]:
        """Return the format of a row, and the row with lists in place of those in JSON text."""
        name = recognise(row, self.columns.formats) if self.form == "auto" else self.form
        form = FORMATS[name] if isinstance(name, str) else name
        lists = [key for key in LISTS.intersection(form.turns) if isinstance(row.get(key), str)]
        # CSV: '[{"role": "user", "content": "Hi"}, ...]'
        return form, {**row, **{key: parsed(row[key], key) for key in lists}}

    def _with_row(self, messages: Any, form: RowFormat, row: Fields) -> list[Message]:
        """Return the turns that a format has read, with the row's system turn and weight, if they are a conversation.

        Raises BadRow if they are none, ContractError for an answer that no format may give.
        """
        if not messages or any(not isinstance(turn, Message) for turn in messages):
            raise ContractError(f"row_format {form} returned {quoted(messages)}; allowed: a list of Message, not empty")
        # KTO: {prompt, completion, label: false} is an answer that somebody disliked.
        if self.label_field != "label" and spelling(row.get("label")) == "false":
            raise BadRow(
                "label is false, so its answer is a bad one: data.skip_bad drops such rows; data.label_field label "
                "keeps those of data.train"
            )
        # LLaMA-Factory's Alpaca rows have a field system beside instruction, input and output.
        system = [Message("system", field_text(row, "system"))] if row.get("system", "") != "" else []
        if system and messages[0].role == "system":
            raise BadRow("the row has a field system and a system turn; leave one out (data.columns '{system: null}')")
        weight = weight_of(row)
        # A format of a user may have given anything: -1 would be learnt away, nan would end the training.
        messages = [
            replace(
                turn, content=checked_text(turn.content, "content"), weight=weight * weight_of({"weight": turn.weight})
            )
            for turn in [*system, *messages]
        ]
        return checked(last_alone(messages) if self.last else messages)


def _unread(row: Fields, read: Collection[object], turns: Collection[str]) -> set[str]:
    """Name the fields of a row and of its turns that say something and are not read: `source`, `messages[].date`.

    read   the fields of the row that are read
    turns  those that hold turns, a list or a single one
    Raises BadRow for one of REFUSED.
    """
    fields = [("", name, value) for name, value in row.items() if name not in read]
    for key in turns:
        held = row.get(key)
        for turn in held if isinstance(held, list) else [held]:  # a prompt may be a single turn, or a text
            if isinstance(turn, Mapping):
                said = without_null(turn)
                known = (*keys_of(said), *TURN_FIELDS)
                fields += [(f"{key}[].", name, value) for name, value in said.items() if name not in known]
    names = set()
    for place, name, value in fields:
        if filled(value):
            if name in REFUSED and spelling(value) not in ("false", "0"):  # `image: false` is only named
                raise BadRow(
                    f"{place}{name} is {quoted(value)}: images, videos, sound and a history are not supported (write "
                    "earlier turns in `messages`); remove the field from rows that are complete without it"
                )
            names.add(quoted(place + name))
    return names


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def _name(value: Any, what: str) -> str:
    """Return an id or a label as text; it is printed."""
    # Tables with gaps have 4.0 for the id 4: both are "4".
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
    """An instruction, an input for it, or one of them alone, and an output."""

    fields = turns = FORMAT_FIELDS["alpaca"]

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the user's turn, with the input in its last line, and the assistant's."""
        said = [field_text(row, "instruction"), checked_text(row.get("input", ""), "input")]
        prompt = "\n".join(filter(visible, said))  # as LLaMA-Factory joins them
        if not prompt:
            raise BadRow("instruction and input are empty")
        return [Message("user", prompt), Message("assistant", field_text(row, "output"), True)]


class PromptCompletion(RowFormat):
    """A prompt and a completion, each a text, a turn or a list of turns."""

    fields = turns = FORMAT_FIELDS["prompt_completion"]

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the prompt's turns, none of them trained, and the completion's behind them."""
        prompt, completion = (  # TRL: two texts, or [{"role": "user", ...}] and [{"role": "assistant", ...}]
            [Message(role, field_text(row, name), role == "assistant")]
            if isinstance(field_of(row, name), str)
            else turns_of(row[name], name, roles)
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        return [replace(turn, trained=False) for turn in prompt] + completion


class PlainText(RowFormat):
    """A document without turns: one message of the role text, which data.format text alone chooses."""

    fields = turns = FORMAT_FIELDS[TEXT]
    shared = ()

    def read(self, row: Fields, *, roles: Mapping[str, str]) -> list[Message]:
        """Return the document."""
        return [Message(TEXT, field_text(row, TEXT), True)]


FORMATS: dict[str, RowFormat] = {
    "messages": Messages(),
    "sharegpt": Messages(field="conversations"),
    "alpaca": Alpaca(),
    "prompt_completion": PromptCompletion(),
    TEXT: PlainText(),
}
"""Our formats by the words of data.format."""
