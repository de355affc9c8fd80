"""A sheet for raters who do not know which model answered, and the filled sheet as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError
from sftmix.common.figures import markdown_table
from sftmix.common.files import read_json, replacing, sha256_json, write_json
from sftmix.common.rng import generator
from sftmix.tools.answers.questions import Question

SHEET, KEY = "sheet.csv", "key.json"

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of a cell that a spreadsheet runs as a formula or takes for a number."""


def write_blind(to: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[str]], seed: int) -> None:
    """Write sheet.csv, with the answers of two models in an order and under letters drawn by the seed, and key.json.

    answers  model -> the text of each question's answer
    A sheet that is there already is left as it is: raters may have filled it. Raises ConfigError if the key there is
    that of another sheet.
    """
    import pandas as pd

    order = generator(seed, "blind order").permutation(len(questions)).tolist()
    swapped = (generator(seed, "blind letters").random(len(questions)) < 0.5).tolist()
    names, rows, key = list(answers), [], []
    for place in order:
        a, b = names[::-1] if swapped[place] else names
        shown = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in questions[place].messages)
        cells = (shown, answers[a][place], answers[b][place])
        rows.append([f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in cells])  # then it is text
        key.append({"id": questions[place].id, "A": a, "B": b})
    name = f"s{sha256_json([names, rows, key])[:8]}"  # with a letter first, no spreadsheet makes a number of it
    whole = {"sheet": name, "seed": seed, "models": names, "rows": key}
    if (to / KEY).exists() and read_json(to / KEY) != whole:
        raise ConfigError(f"{to / KEY} is of another sheet; move it and its sheet away, or use another --to")
    write_json(to / KEY, whole)  # first: no sheet is ever without it
    if not (to / SHEET).exists():
        frame = pd.DataFrame(rows, columns=["question", "A", "B"], index=pd.RangeIndex(1, len(rows) + 1, name="number"))
        with replacing(to / SHEET) as file:  # the mark of utf-8-sig tells spreadsheets that it is UTF-8
            frame.assign(better="", sheet=name).to_csv(file, encoding="utf-8-sig", lineterminator="\r\n")


def read_blind(sheets: Sequence[Path], key: Path | None = None) -> str:
    """Read filled sheets and return their judgements as a Markdown table, a line for each.

    key  the key file; None: key.json beside the first sheet
    Raises DataError for a sheet that is not of this key, or has other judgements; ConfigError if a file is not there.
    """
    where = sheets[0].parent / KEY if key is None else key
    for path in (where, *sheets):
        if not path.exists():
            raise ConfigError(f"{path} is not there; --key names the key.json that was written with the sheet")
    known = read_json(where, models=list, rows=list, sheet=str)
    first, second = known["models"]
    table = [["sheet", f"{first} better", "tie", f"{second} better", "not rated", "sign test p"]]
    for sheet in sheets:
        better = _judgements(sheet, known)
        counts = [better[name] for name in (first, "tie", second, "")]
        table.append([str(sheet), *map(str, counts), f"{sign_test(better[first], better[second]):.4g}"])
    return markdown_table(table)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p of "both are equally often better", without ties; 1.0 where nothing is decided."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _judgements(sheet: Path, key: Mapping[str, Any]) -> Counter[str]:
    """Count how often each model of a sheet was better, "tie", and "" for what was not rated."""
    import pandas as pd

    with sheet.open(encoding="utf-8-sig", errors="replace") as file:
        delimiter = max(",;\t", key=file.readline().count)  # spreadsheets may have written ; or tabs
        file.seek(0)
        frame = pd.read_csv(file, sep=delimiter, dtype=str, keep_default_na=False)
    frame = frame.reindex(columns=["number", "better", "sheet"], fill_value="")
    frame = frame[frame.number != ""]  # spreadsheets end with rows of nothing
    rows = {str(number): {**row, "TIE": "tie", "": ""} for number, row in enumerate(key["rows"], start=1)}
    words, better = frame.better.str.strip().str.upper(), Counter[str]()
    unique = frame.number.is_unique and set(frame.number) <= rows.keys() and set(frame.sheet) <= {key["sheet"]}
    if not unique or not set(words) <= {"A", "B", "TIE", ""}:
        raise DataError(
            f"{sheet}: allowed are number 1 to {len(rows)}, each once; better A, B, tie or nothing; and sheet "
            f"{key['sheet']}, of which --key is the key"
        )
    better.update(rows[number][word] for number, word in zip(frame.number, words, strict=True))
    better[""] += len(rows) - len(frame)
    return better
