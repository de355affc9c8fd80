"""The base class of row formats: what makes conversations of rows, beside the renderer of these."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from sftmix.components.component import Component
from sftmix.types import Message


class RowFormat(Component, ABC):
    """A row -> its conversation. Ours are chosen by the words of data.format, yours by its import path."""

    option = "row_format"
    instead = "; our formats are words of data.format"
    fields: Collection[str] = ()
    """The fields that it reads. Of the others the report counts those that say something; scalars become columns."""
    turns: Collection[str] = ()
    """The fields with turns as our own formats have them, whose own fields are looked at as well."""

    shared: Collection[str] = ("system", "weight", "loss_weight", "tools", "functions")
    """The fields that are read behind it, of every row of conversations; of documents none."""

    @abstractmethod
    def read(self, row: Mapping[str, Any], *, roles: Mapping[str, str]) -> list[Message]:
        """Return the turns; those of the assistant that are to be learnt are `trained`.

        What every format has is done behind it: id, label, weight, `system`, tools, and the check that turns alternate.
        Raises BadRow, which says why, for a row that is not of this format.

        row    name -> value, under our names (data.columns), without null
        roles  data.roles, for `sftmix.text.turns.turns_of`
        """
