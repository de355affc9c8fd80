"""Rows that are asked: they are read as training reads its rows, but need no answer, and none that is trained."""

from dataclasses import replace
from typing import Any

from sftmix.common.row_format import RowFormat
from sftmix.options.data import DataOptions
from sftmix.text.formats import Columns, Converter, recognise
from sftmix.text.values import Fields
from sftmix.types import Example, Message
from sftmix.words.fields import FORMAT_FIELDS, TEXT

ANSWERS = {"instruction": "output", "prompt": "completion"}
"""Fields that ask -> those of their answers."""


def asked(row: Fields, columns: Columns, data: DataOptions) -> Example:
    """Read one row, as `Columns.renamed` returns it, with an empty answer if it has none. Raises BadRow.

    A row without any field of data.format is read by the format that its own fields name; documents ask nothing.
    """
    answered = {answer: "" for question, answer in ANSWERS.items() if question in row} | dict(row)
    form: RowFormat | str = data.format
    fields = FORMAT_FIELDS.get(form, ()) if isinstance(form, str) else form.fields
    if form in ("auto", TEXT) or (fields and not row.keys() & {*fields}):
        # {prompt, output}: as it is, it lacks one field of Alpaca's and one of prompt/completion.
        form = recognise(answered, (*columns.formats, recognise(row, columns.formats)))
    return _Asking(columns, form, data.roles).example(answered)


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
