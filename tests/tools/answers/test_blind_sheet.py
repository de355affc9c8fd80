"""The blind sheet of docs/examples: sides are drawn, and the count finds each model behind them."""

import csv
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "blind_sheet.py"
SHEET = runpy.run_path(str(EXAMPLE))
LINES = [
    {
        "id": f"q{k}",
        "messages": [{"role": "user", "content": f"Question {k}?"}],
        "answers": {"a": f"A{k}", "b": f"B{k}"},
    }
    for k in range(40)
]


def filled(path, verdict):
    """Fill the last column by a function of a row."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row | {"better": verdict(row)} for row in csv.DictReader(file)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_each_win_goes_to_the_model_behind_its_side(tmp_path):
    path = tmp_path / "sheet.csv"
    SHEET["make_sheet"](LINES, ["a", "b"], path)
    rows = filled(path, lambda row: "tie" if row["id"] < "q2" else "left" if row["left"].startswith("A") else " Right")
    ties = sum(row["better"] == "tie" for row in rows)
    assert {row["left"][0] for row in rows} == {"A", "B"}  # both sides are drawn
    assert json.loads((tmp_path / "sheet.key.json").read_text())["q7"] in (["a", "b"], ["b", "a"])
    assert SHEET["count"](path) == (Counter(a=40 - ties, b=0, tie=ties), pytest.approx(2 / 2 ** (40 - ties)))


def test_a_line_without_a_verdict_is_named(tmp_path):
    SHEET["make_sheet"](LINES, ["a", "b"], tmp_path / "sheet.csv")
    with pytest.raises(SystemExit, match="q0: better is ''"):
        SHEET["count"](tmp_path / "sheet.csv")
