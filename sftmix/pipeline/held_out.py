"""The groups by which the held-out NLL is told beside its mean: labels, or the names of `data.eval`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from sftmix.common.plain import as_list
from sftmix.data import EncodedDataset

MOST = 20
"""Most groups that are told: more of them are no groups, but scores, and would fill every log."""


def held_out_groups(rows: EncodedDataset | None, names: str | list[str] | None) -> tuple[list[str] | None, str]:
    """Return the group of each held-out row (None: they are one group), and a note if there are too many groups.

    rows that eval_fraction held out go by their labels, rows of several files or data sets by the names of these.

    names  data.eval
    """
    if rows is None or rows.packed:  # a packed window holds documents of several sources
        return None, ""
    if rows.labels is not None:
        groups, what = [str(label) for label in rows.labels], "labels (data.label_field)"
    else:
        groups, what = _by_name(rows.sources, as_list(names) if names is not None else []), "names in data.eval"
    count = len(set(groups))
    if count > MOST:
        return None, f"held-out NLL is not told apart by {count} {what}: only up to {MOST} are"
    return (groups if count > 1 else None), ""


def _by_name(sources: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return for each place of a row, such as `file:line`, the name it belongs to; none for a single name.

    A name is shortened to its last part where that tells it from the others.
    """
    if len(names) < 2:
        return []
    forms = {name: _starts(name) for name in names}
    last = {name: PurePath(name).name for name in names}
    shown = last if len(set(last.values())) == len(last) else {name: name for name in names}
    return [shown[max((n for n in names if forms[n].match(source)), key=len)] for source in sources]


def _starts(name: str) -> re.Pattern[str]:
    """Return the pattern of places in a file or data set of this name, or in a file of a directory of this name."""
    forms = {re.escape(name), re.escape(str(PurePath(name)))}
    return re.compile(rf"(?:{'|'.join(sorted(forms))})(?:$|[:\[/])")
