"""A sheet for raters who do not know which model answered, and the filled sheet as a table."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import read_json, replacing, sha256_json
from sftmix.common.rng import generator
from sftmix.tools.answers.questions import Question

SHEET, KEY = "sheet.csv", "key.json"
COLUMNS = ("number", "question", "A", "B", "better", "sheet")

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of a cell that a spreadsheet runs as a formula or takes for a number."""


def write_blind(to: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[str]], seed: int) -> None:
    """Write sheet.csv, with the answers of two models in an order and under letters drawn by the seed, and key.json.

    answers  model -> the text of each question's answer
    Raises ConfigError if one of the files is there with another content, such as judgements.
    """
    order = generator(seed, "blind order").permutation(len(questions)).tolist()
    swapped = (generator(seed, "blind letters").random(len(questions)) < 0.5).tolist()
    names, rows, key = list(answers), [], []
    for number, place in enumerate(order, start=1):
        question = questions[place]
        a, b = names[::-1] if swapped[place] else names
        shown = question.messages[0]["content"]
        if len(question.messages) > 1:
            shown = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in question.messages)
        # A spreadsheet takes `'=1+1` for text, and runs `=1+1`.
        cells = [f"'{c}" if c.startswith(_FORMULA) else c for c in (shown, answers[a][place], answers[b][place])]
        rows.append([number, *cells, ""])
        key.append({"id": question.id, "A": a, "B": b})
    name = f"s{sha256_json([names, rows, key])[:8]}"  # with a letter first, no spreadsheet makes a number of it
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([COLUMNS, *([*row, name] for row in rows)])
    told = {"sheet": name, "seed": seed, "models": names, "rows": key}
    files = {  # the key first: no sheet is ever without it
        to / KEY: json.dumps(told, indent=1, ensure_ascii=False).encode() + b"\n",
        to / SHEET: text.getvalue().encode("utf-8-sig"),  # the mark by which spreadsheets recognise UTF-8
    }
    if any(path.exists() and path.read_bytes() != content for path, content in files.items()):
        raise ConfigError(
            f"{SHEET} or {KEY} in {to} is not what would be written: raters may have filled the sheet. --read_blind "
            "reads it; to write anew, move both away or use another --to"
        )
    for path, content in files.items():
        with replacing(path) as file:
            file.write(content)


def read_blind(sheets: Sequence[Path], key: Path | None = None) -> str:
    """Read filled sheets and return their judgements as a Markdown table, a line for each.

    Of several sheets, one for each rater, the last line is that of all: each question counts once, for the model that
    more raters found better.

    key  the key file; None: key.json beside the first sheet
    Raises DataError naming the row of a sheet that cannot be read, or that is not of this key; ConfigError if the key
    is not there.
    """
    where = sheets[0].parent / KEY if key is None else key
    for path in (where, *sheets):
        if not path.exists():
            raise ConfigError(f"{path} is not there; --key names the key.json that was written with the sheet")
    known = read_json(where, models=list, rows=list, sheet=str)
    judged = {str(sheet): _judgements(sheet, known) for sheet in sheets}
    if len(sheets) > 1:
        together = Counter[str]()
        for found in judged.values():
            together.update(found)
        judged["all raters, by question"] = dict(together)
    first, second = known["models"]
    head = f"| sheet | {first} better | tie | {second} better | not rated | sign test p |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, found in judged.items():
        wins, losses = (sum(better * sign > 0 for better in found.values()) for sign in (1, -1))
        figures = [wins, len(found) - wins - losses, losses, len(known["rows"]) - len(found)]
        lines.append(f"| {name} | {' | '.join(map(str, figures))} | {sign_test(wins, losses):.4g} |")
    return "\n".join(lines)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p of "both are equally often better", without ties; 1.0 where nothing is decided."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _judgements(sheet: Path, key: Mapping[str, Any]) -> dict[str, int]:
    """Return question id -> 1 if the first model is better, -1 if the second, 0 for a tie; of the rated rows."""
    text = sheet.read_text(encoding="utf-8-sig", errors="replace")  # the columns that are read are ASCII
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # spreadsheets may have written ; or tabs
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    numbers = {str(number): row for number, row in enumerate(key["rows"], start=1)}
    judgements: dict[str, int] = {}
    for row in reader:
        number, better, name = ((row.get(column) or "").strip() for column in ("number", "better", "sheet"))
        if not (number or better or name):  # spreadsheets end with rows of nothing
            continue
        if name != key["sheet"] or number not in numbers or better.lower() not in ("", "a", "b", "tie"):
            raise DataError(
                f"{sheet}:{reader.line_num}: number {number!r}, better {better!r}, sheet {name!r}: allowed are 1 to "
                f"{len(key['rows'])}, each once; A, B, tie, or nothing; and {key['sheet']}, of which --key is the key"
            )
        answer = numbers.pop(number)
        if better:
            is_first = answer.get(better.upper()) == key["models"][0]
            judgements[answer["id"]] = 0 if better.lower() == "tie" else 1 if is_first else -1
    return judgements
