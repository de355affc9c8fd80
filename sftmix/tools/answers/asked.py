"""Rows that are asked: they are read as training reads its rows, but need no answer, and none that is trained."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sftmix.components.row_format import RowFormat
from sftmix.text.formats import Columns, Converter, recognise
from sftmix.text.values import Fields
from sftmix.types import Example, Message
from sftmix.words.fields import TEXT, fields_of

ANSWERS = {"instruction": "output", "prompt": "completion"}
"""Fields that ask -> those of their answers."""


def asked(row: Fields, columns: Columns, form: RowFormat | str, roles: Mapping[str, str] | None) -> Example:
    """Read one row, as `Columns.renamed` returns it, with an empty answer if it has none. Raises BadRow.

    A row without any field of the format is read by the format that its own fields name; documents ask nothing.

    form   a row format, or a word of data.format
    roles  data.roles
    """
    answered = {answer: "" for question, answer in ANSWERS.items() if question in row} | dict(row)
    fields = fields_of(form)
    if form in ("auto", TEXT) or (fields and not row.keys() & {*fields}):
        # {prompt, output}: as it is, it lacks one field of Alpaca's and one of prompt/completion.
        form = recognise(answered, (*columns.formats, recognise(row, columns.formats)))
    return _Asking(columns, form, roles).example(answered)


class _Asking(Converter):
    """Converter of such rows."""

    def _with_row(self, messages: Any, form: RowFormat, row: Fields) -> list[Message]:
        """Return the turns, of which the last is an answer that counts as trained, whatever label and weights say."""
        match messages:
            case [*before, Message(role="assistant") as answer]:
                messages = [*before, replace(answer, trained=True, weight=1.0)]
            case [*_, Message(role="user" | "tool")]:
                messages = [*messages, Message("assistant", "", True)]
        return super()._with_row(messages, form, {**row, "label": None, "weight": 1, "loss_weight": 1})
