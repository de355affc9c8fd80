"""The sheet for raters: nothing in it tells the models, and the filled sheet gives the table and the sign test."""

from __future__ import annotations

import csv
import io
import json
from math import comb

import pytest

from sftmix.common.errors import ConfigError, DataError
from sftmix.tools.answers.blind import read_blind, sign_test, write_blind
from sftmix.tools.answers.questions import Question

N = 40


def rows_of(path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def fill(path, better, *, delimiter: str = ",") -> None:
    """Fill the sheet as a spreadsheet would: `better` says what is written for a row."""
    rows = rows_of(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "better": better(row)} for row in rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def written(to, seed: int = 3):
    """Write the sheet of N questions and its key; return the sheet."""
    questions = [Question(f"q{i}", ({"role": "user", "content": f'Ask; {i},\n"why"?'},)) for i in range(N)]
    answers = {name: [f"{name[0]} says {i}\nÄ" for i in range(N)] for name in ("target", "baseline")}
    write_blind(to, questions, answers, seed)
    return to / "sheet.csv"


def counts(*sheets, key=None) -> list[list[str]]:
    """Of each line of the table: first model better, tie, second better, not rated, p."""
    lines = read_blind(sheets, key).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]


@pytest.fixture
def sheet(tmp_path):
    return written(tmp_path)


def test_the_sheet_hides_the_models_and_the_key_tells_them(sheet):
    text = sheet.read_text(encoding="utf-8-sig")
    assert "target" not in text
    assert "baseline" not in text
    key = json.loads((sheet.parent / "key.json").read_text())
    letters = []
    for row, known in zip(rows_of(sheet), key["rows"], strict=True):
        i = known["id"].removeprefix("q")
        assert row["question"] == f'user: Ask; {i},\n"why"?'
        assert [row["A"][0], row["B"][0]] == [known["A"][0], known["B"][0]]
        assert row["A"].endswith(f"says {i}\nÄ")
        letters.append(known["A"])
    assert 10 < letters.count("target") < 30
    assert [row["id"] for row in key["rows"]] != [f"q{i}" for i in range(N)]


@pytest.mark.parametrize("begin", ["=1+1", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_no_cell_is_a_formula(begin, tmp_path):
    """A spreadsheet takes what stands behind an apostrophe for text; other cells stay as they are."""
    question = Question("q", ({"role": "user", "content": begin},))
    write_blind(tmp_path, [question], {"target": [begin], "baseline": ["a = 1"]}, seed=0)
    with open(tmp_path / "sheet.csv", encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["question"] == f"user: {begin}"
    assert {row["A"], row["B"]} == {f"'{begin}", "a = 1"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_filled_sheet_gives_the_counts(sheet, delimiter):
    """A rater who likes the target in 25 rows, the baseline in 5, says tie in 7 and leaves 3 out."""

    def better(row) -> str:
        i = int(row["A"].split()[2])
        like = "t" if i < 25 else "b"
        return "" if i >= 37 else "Tie " if i >= 30 else "a" if row["A"][0] == like else "B"

    fill(sheet, better, delimiter=delimiter)
    with sheet.open("a", encoding="utf-8") as file:
        file.write(f"{delimiter * 5}\n")  # as spreadsheets leave them at the end
    exact = 2 * sum(comb(30, k) for k in range(6)) / 2**30
    assert sign_test(25, 5) == pytest.approx(exact, rel=1e-12)
    assert counts(sheet, sheet) == [["25", "7", "5", "3", f"{exact:.4g}"]] * 2


def test_a_judgement_that_is_none_is_named(sheet):
    fill(sheet, lambda row: "C" if row["number"] == "7" else "")
    with pytest.raises(DataError, match=r"sheet.csv: .* better A, B, tie or nothing"):
        read_blind([sheet])


def test_a_sheet_needs_its_own_key(sheet, tmp_path):
    copy = tmp_path / "copy" / "sheet.csv"
    copy.parent.mkdir()
    copy.write_bytes(sheet.read_bytes())
    with pytest.raises(ConfigError, match="--key"):
        read_blind([copy])
    assert counts(copy, key=sheet.parent / "key.json") == [["0", "0", "0", str(N), "1"]]
    other = written(tmp_path / "other", seed=4).parent / "key.json"
    with pytest.raises(DataError, match=r"sheet.csv: .* sheet s\w{8}, of which --key is the key"):
        read_blind([sheet], other)


def test_a_filled_sheet_is_never_overwritten(sheet):
    key = sheet.parent / "key.json"
    fill(sheet, lambda row: "A")
    filled, known = sheet.read_bytes(), key.read_bytes()
    assert written(sheet.parent).read_bytes() == filled
    sheet.unlink()  # given to a rater: another key would not be that of the sheet
    with pytest.raises(ConfigError, match="of another sheet"):
        written(sheet.parent, 4)
    assert (sheet.exists(), key.read_bytes()) == (False, known)


def test_the_command_writes_and_reads_the_sheet(sftmix, finished, tmp_path):
    words = ["generate", str(finished.path), "--format", "blind", "--to", str(tmp_path / "b"), "--max_new_tokens", "3"]
    refused = sftmix(*words)
    assert (refused.code, "--models target,baseline" in refused.err) == (2, True)
    assert sftmix(*words, "--models", "target,baseline").code == 0
    done = sftmix("generate", "--read_blind", str(tmp_path / "b" / "sheet.csv"))
    assert done.out.replace(" ", "").endswith("|0|0|0|11|1|\n")
