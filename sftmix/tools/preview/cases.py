"""The table of rows that are bad, dropped, cut or not wholly read."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sftmix.data.report import REASONS, UNREAD, Case
from sftmix.disk.files import placing
from sftmix.words.shown import as_cell

FACTS = {"system", "thought", "weighted"}
"""Reasons of a report that take nothing from a row."""


def write_cases(path: Path, cases: Sequence[tuple[str, Case]]) -> int:
    """Write a CSV with a line for each case, in the order in which rows are read; return the number of lines.

    A field that is not read has one line, of its first row.
    """
    unread = Counter(case.detail for reason, case in cases if reason == UNREAD)
    lines = []
    for reason, case in cases:
        detail = case.detail.removeprefix(": ")
        if reason == UNREAD and (rows := unread.pop(case.detail, 0)) != 1:
            if not rows:
                continue
            detail += f", in {rows:,} rows"
        if reason not in FACTS:
            lines.append([case.source, case.id, _words(reason), detail])
    with placing(path) as staging, staging.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["source", "id", "reason", "detail"])
        table.writerows([as_cell(cell) for cell in line] for line in lines)
    return len(lines)


def _words(reason: str) -> str:
    """Return the words of a reason for one row: without the option behind them, which the report names."""
    # "example{s} cut at data.max_length = {length} (...)" -> "example cut at data.max_length"
    words = REASONS.get(reason, "field not read").partition("(")[0].format(s="", length="")
    return words.strip(" :=")
