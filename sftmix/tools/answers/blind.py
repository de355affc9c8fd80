"""A sheet for raters who do not know which model answered, and the filled sheet as a table."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import read_json, replacing, sha256_json, write_json
from sftmix.common.rng import generator
from sftmix.tools.answers.formats import Answered, Rows
from sftmix.tools.answers.questions import Question

SHEET, KEY = "sheet.csv", "key.json"
COLUMNS = ("number", "question", "A", "B", "better", "sheet")
TIE = "tie"

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of a cell that a spreadsheet runs as a formula or takes for a number."""


class Blind(Rows):
    """sheet.csv with two answers to each question, in an order and under letters drawn by the seed; key.json."""

    models = 2

    def answers_file(self, to: Path, labels: Sequence[str]) -> Path:
        return to / "answers.jsonl"

    def files(self, to: Path, labels: Sequence[str]) -> list[Path]:
        return [to / SHEET, to / KEY]

    def write(self, to: Path, questions: Sequence[Question], models: Sequence[Answered], *, seed: int) -> list[Path]:
        order = generator(seed, "blind order").permutation(len(questions)).tolist()
        swapped = (generator(seed, "blind letters").random(len(questions)) < 0.5).tolist()
        rows, key = [], []
        for number, place in enumerate(order, start=1):
            pair = [models[1], models[0]] if swapped[place] else list(models)
            texts = [_shown(questions[place]), *(model.turns[place][0] for model in pair)]
            rows.append([number, *map(_as_text, texts), ""])
            key.append({"id": questions[place].id, "A": pair[0].name, "B": pair[1].name})
        names = [model.name for model in models]
        name = f"s{sha256_json([names, rows, key])[:8]}"  # begins with a letter: no spreadsheet takes it for a number
        _keep(to, _sheet(rows, name), {"sheet": name, "seed": seed, "models": names, "rows": key})
        return self.files(to, names)


def _as_text(cell: str) -> str:
    """Return a cell that a spreadsheet takes for text: `'=1+1` for `=1+1`."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _sheet(rows: Sequence[Sequence[Any]], name: str) -> bytes:
    text = io.StringIO()
    sheet = csv.writer(text, lineterminator="\r\n")
    sheet.writerows([COLUMNS, *([*row, name] for row in rows)])
    return text.getvalue().encode("utf-8-sig")  # the mark by which spreadsheets recognise UTF-8


def _keep(to: Path, sheet: bytes, key: Mapping[str, Any]) -> None:
    """Write both files; raise ConfigError if one of them is there with another content, such as judgements."""
    same = {to / SHEET: lambda path: path.read_bytes() == sheet, to / KEY: lambda path: read_json(path) == key}
    for path, is_same in same.items():
        if path.exists() and not is_same(path):
            raise ConfigError(
                f"{path} is there and is not what would be written: raters may have filled the sheet. Both files are "
                f"left as they are; --read_blind reads the sheet. To write anew, move {SHEET} and {KEY} away or use "
                "another --to"
            )
    write_json(to / KEY, key)  # first: no sheet is ever without its key
    with replacing(to / SHEET) as file:
        file.write(sheet)


def _shown(question: Question) -> str:
    if len(question.messages) == 1:
        return question.messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in question.messages)


# ------------------------------------------------------------------------------------------- reading back


@dataclass(frozen=True)
class Verdict:
    """Judgements of one sheet, or of several: how often the first model was better, equal, worse.

    unrated  questions without a judgement
    """

    name: str
    wins: int
    ties: int
    losses: int
    unrated: int

    @property
    def p_value(self) -> float:
        """Exact two-sided sign test of "both are equally often better"; ties are left out. 1.0 without any."""
        from scipy.stats import binomtest

        decided = self.wins + self.losses
        return float(binomtest(self.wins, decided).pvalue) if decided else 1.0


def read_blind(sheets: Sequence[Path], key: Path | None = None) -> tuple[list[str], list[Verdict]]:
    """Read filled sheets; return both models and the verdict of each sheet.

    Of several sheets, one for each rater, the last verdict is that of all: each question counts once, for the model
    that more raters found better.

    key  the key file; None: key.json beside the first sheet
    Raises DataError naming the row of a sheet that cannot be read, or that is not of this key; ConfigError if the key
    is not there.
    """
    where = sheets[0].parent / KEY if key is None else key
    if not where.exists():
        raise ConfigError(f"{where} is not there; --key names the key.json that was written with the sheet")
    known: Mapping[str, Any] = read_json(where)
    read = [dict(_judgements(sheet, known)) for sheet in sheets]
    verdicts = [_verdict(str(sheet), found, known) for sheet, found in zip(sheets, read, strict=True)]
    if len(sheets) > 1:
        sums = Counter[str]()
        for found in read:
            for name, judgement in found.items():
                sums[name] += judgement
        verdicts.append(_verdict("all raters, by question", dict(sums), known))
    return list(known["models"]), verdicts


def _verdict(name: str, judgements: Mapping[str, int], key: Mapping[str, Any]) -> Verdict:
    wins, losses = (sum(1 for j in judgements.values() if j * sign > 0) for sign in (1, -1))
    ties = len(judgements) - wins - losses
    return Verdict(name, wins, ties, losses, len(key["rows"]) - len(judgements))


def _judgements(sheet: Path, key: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (question id, 1 if the first model is better, -1 if the second, 0 for a tie) of the rated rows."""
    first, known_name = key["models"][0], key.get("sheet", "")
    values = {"a": lambda row: 1 if row["A"] == first else -1, "b": lambda row: 1 if row["B"] == first else -1}
    seen = set[str]()
    for place, row in _sheet_rows(sheet):
        if (name := row.get("sheet", "").strip()) != known_name:
            raise DataError(
                f"{place}: the row is of the sheet {name or '(none)'}, and the key of {known_name or '(none)'}; --key "
                "names the key.json that was written with the sheet"
            )
        number, better = row["number"].strip(), row["better"].strip().lower()
        if not number.isdigit() or not 1 <= int(number) <= len(key["rows"]):
            raise DataError(f"{place}: number is {number!r}; the key has 1 to {len(key['rows'])}")
        if number in seen:
            raise DataError(f"{place}: number {number} occurs twice")
        seen.add(number)
        if better and better not in (*values, TIE):
            raise DataError(f"{place}: better is {row['better']!r}; allowed: A, B, tie, or nothing if it was not rated")
        if better:
            known = key["rows"][int(number) - 1]
            yield known["id"], 0 if better == TIE else values[better](known)


def _sheet_rows(sheet: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`file:line`, row) of a sheet; spreadsheets may have written `;` or tabs for commas."""
    try:
        text = sheet.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{sheet}: cannot be read: {error}") from error
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if missing := [name for name in ("number", "better") if name not in (reader.fieldnames or [])]:
        raise DataError(f"{sheet}:1: the sheet has no column {' and '.join(missing)}; there are {head.strip()!r}")
    for row in reader:
        cells = {name: value or "" for name, value in row.items() if name}
        if any(cell.strip() for cell in cells.values()):  # spreadsheets end with rows of nothing
            yield f"{sheet}:{reader.line_num}", cells


def table(models: Sequence[str], verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as a Markdown table."""
    head = f"| sheet | {models[0]} better | tie | {models[1]} better | not rated | sign test p |"
    lines = [f"| {v.name} | {v.wins} | {v.ties} | {v.losses} | {v.unrated} | {v.p_value:.4g} |" for v in verdicts]
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])
