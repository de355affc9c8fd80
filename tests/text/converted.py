"""One row as an example, by its format's word."""

from sftmix.text.formats import Columns, Converter


def convert(row, form="auto", first=(), *, source="", label=None, **more):
    """Read a row; `first`: formats that auto tries before the others."""
    columns = Columns(None)
    columns.formats = list(first)
    return Converter(columns=columns, form=form, **more).example(row, source, label)
