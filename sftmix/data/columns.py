"""Rows whose fields have other names than ours (data.columns)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftmix.common.errors import DataError, nearest, told
from sftmix.common.fields import ANY_FORMAT, field_columns, formats_with, listed


class Columns:
    """Reader of rows under the names of our fields.

    names    our field -> its name in the rows; empty: the rows have our names
    formats  the formats that read all these fields, which data.format auto tries first
    """

    def __init__(self, columns: Mapping[str, str] | None) -> None:
        self.names = field_columns(columns)
        self.formats = formats_with(self.names) if set(self.names) - set(ANY_FORMAT) else []
        self._present: dict[str, None] = {}  # names of the rows' fields, in their order

    def renamed(self, row: Any) -> Any:
        """Return the row under our names, and remember its fields; what is no object is returned as it is.

        A field takes the place of another of its name. A row without the column keeps its own field.
        """
        if not self.names or not isinstance(row, Mapping):
            return row
        self._present.update(dict.fromkeys(row))
        moved = {field: row[column] for field, column in self.names.items() if column in row}
        columns = self.names.values()
        return {**moved, **{key: value for key, value in row.items() if key not in moved and key not in columns}}

    def label_field(self, name: str | None) -> str | None:
        """Return data.label_field under our name."""
        return next((field for field, column in self.names.items() if column == name), name)

    def check(self, option: str, *, own_names: bool) -> None:
        """Raise DataError for a column that none of the rows has.

        option     name of the option that holds the files of the rows
        own_names  rows that have the field under our name are fine, too
        """
        for field, column in self.names.items():
            if column not in self._present and not (own_names and field in self._present):
                raise DataError(
                    told(
                        f"data.columns: no row of {option} has the field {column!r} (for {field})",
                        nearest(column, self._present),
                        f"the fields there are {listed(self._present)}",
                    )
                )
