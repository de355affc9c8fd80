"""A sheet for raters who do not know which model answered, and the filled sheet as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftmix.common.errors import ConfigError, DataError
from sftmix.common.figures import markdown_table
from sftmix.common.files import read_json, replacing, sha256_json, write_json
from sftmix.common.rng import generator
from sftmix.tools.answers.questions import Question

SHEET, KEY = "sheet.csv", "key.json"
COLUMNS = ("number", "question", "A", "B", "better", "sheet")


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
    for number, place in enumerate(order, start=1):
        question = questions[place]
        a, b = names[::-1] if swapped[place] else names
        shown = question.messages[0]["content"]
        if len(question.messages) > 1:
            shown = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in question.messages)
        cells = (shown, answers[a][place], answers[b][place])
        # A spreadsheet takes `'=1+1` for text, and runs `=1+1`.
        rows.append([number, *(f"'{cell}" if cell.startswith(tuple("=+-@\t\r\n")) else cell for cell in cells), ""])
        key.append({"id": question.id, "A": a, "B": b})
    name = f"s{sha256_json([names, rows, key])[:8]}"  # with a letter first, no spreadsheet makes a number of it
    whole = {"sheet": name, "seed": seed, "models": names, "rows": key}
    if (to / KEY).exists() and read_json(to / KEY) != whole:
        raise ConfigError(f"{to / KEY} is of another sheet; move it and its sheet away, or use another --to")
    write_json(to / KEY, whole)  # first: no sheet is ever without it
    if not (to / SHEET).exists():
        with replacing(to / SHEET) as file:  # the mark of utf-8-sig tells spreadsheets that it is UTF-8
            frame = pd.DataFrame([[*row, name] for row in rows], columns=COLUMNS)
            frame.to_csv(file, index=False, encoding="utf-8-sig", lineterminator="\r\n")


def read_blind(sheets: Sequence[Path], key: Path | None = None) -> str:
    """Read filled sheets and return their judgements as a Markdown table, a line for each.

    key  the key file; None: key.json beside the first sheet
    Raises DataError naming the row of a sheet that cannot be read, or that is not of this key; ConfigError if a file
    is not there.
    """
    where = sheets[0].parent / KEY if key is None else key
    for path in (where, *sheets):
        if not path.exists():
            raise ConfigError(f"{path} is not there; --key names the key.json that was written with the sheet")
    known = read_json(where, models=list, rows=list, sheet=str)
    first, second = known["models"]
    table = [["sheet", f"{first} better", "tie", f"{second} better", "not rated", "sign test p"]]
    for sheet in sheets:
        better = _judgements(sheet, known["sheet"], known["rows"])
        counts = [better[name] for name in (first, "tie", second, "")]
        table.append([str(sheet), *map(str, counts), f"{sign_test(better[first], better[second]):.4g}"])
    return markdown_table(table)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p of "both are equally often better", without ties; 1.0 where nothing is decided."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _judgements(sheet: Path, name: str, rows: Sequence[Mapping[str, str]]) -> Counter[str]:
    """Count how often each model of a sheet was better, "tie", and "" for what was not rated."""
    import pandas as pd

    with sheet.open(encoding="utf-8-sig", errors="replace") as file:
        delimiter = max(",;\t", key=file.readline().count)  # spreadsheets may have written ; or tabs
        file.seek(0)
        frame = pd.read_csv(file, sep=delimiter, dtype=str, keep_default_na=False)
    numbers = {str(number): row for number, row in enumerate(rows, start=1)}
    better = Counter[str]()
    for row in frame.to_dict("records"):
        number, answer, of_sheet = (str(row.get(column, "")).strip() for column in ("number", "better", "sheet"))
        if not (number or answer or of_sheet):  # spreadsheets end with rows of nothing
            continue
        if of_sheet != name or number not in numbers or answer.lower() not in ("", "a", "b", "tie"):
            raise DataError(
                f"{sheet}: number {number!r}, better {answer!r}, sheet {of_sheet!r}: allowed are 1 to {len(rows)}, "
                f"each once; A, B, tie, or nothing; and {name}, of which --key is the key"
            )
        better[numbers.pop(number).get(answer.upper(), answer.lower())] += 1
    better[""] += len(numbers)
    return better
