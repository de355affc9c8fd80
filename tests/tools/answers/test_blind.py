"""The sheet for raters: nothing in it tells the models, and the filled sheet gives the table and the sign test."""

from __future__ import annotations

import csv
import io
import json
from math import comb

import pytest

from sftmix.common.errors import ConfigError, DataError
from sftmix.tools.answers.blind import Blind, Verdict, read_blind, table
from sftmix.tools.answers.formats import Answered
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
    models = [Answered(name, name, [[f"{name[0]} says {i}\nÄ"] for i in range(N)]) for name in ("target", "baseline")]
    return Blind().write(to, questions, models, seed=seed)[0]


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
        assert row["question"] == f'Ask; {i},\n"why"?'
        assert [row["A"][0], row["B"][0]] == [known["A"][0], known["B"][0]]
        assert row["A"].endswith(f"says {i}\nÄ")
        letters.append(known["A"])
    assert 10 < letters.count("target") < 30
    assert [row["id"] for row in key["rows"]] != [f"q{i}" for i in range(N)]


@pytest.mark.parametrize("begin", ["=1+1", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_no_cell_is_a_formula(begin, tmp_path):
    """A spreadsheet takes what stands behind an apostrophe for text; other cells stay as they are."""
    question = Question("q", ({"role": "user", "content": begin},))
    models = [Answered(name, name, [[text]]) for name, text in (("target", begin), ("baseline", "a = 1"))]
    with open(Blind().write(tmp_path, [question], models, seed=0)[0], encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["question"] == f"'{begin}"
    assert {row["A"], row["B"]} == {f"'{begin}", "a = 1"}


def test_rows_of_nothing_are_none(sheet):
    """As spreadsheets leave them at the end, and where a rater cleared a row."""
    fill(sheet, lambda row: "tie")
    empty = "," * (len(rows_of(sheet)[0]) - 1)
    sheet.write_text(sheet.read_text(encoding="utf-8") + f"{empty}\n , ,{empty[2:]}\n", encoding="utf-8")
    (verdict,) = read_blind([sheet])[1]
    assert (verdict.ties, verdict.unrated) == (N, 0)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_filled_sheet_gives_the_counts(sheet, delimiter):
    """A rater who likes the target in 25 rows, the baseline in 5, says tie in 7 and leaves 3 out."""

    def better(row) -> str:
        i = int(row["A"].split()[2])
        like = "t" if i < 25 else "b"
        return "" if i >= 37 else "Tie " if i >= 30 else "a" if row["A"][0] == like else "B"

    fill(sheet, better, delimiter=delimiter)
    models, (verdict,) = read_blind([sheet])
    assert models == ["target", "baseline"]
    assert (verdict.wins, verdict.ties, verdict.losses, verdict.unrated) == (25, 7, 5, 3)
    exact = 2 * sum(comb(30, k) for k in range(6)) / 2**30
    assert verdict.p_value == pytest.approx(exact, rel=1e-12)
    assert f"| 25 | 7 | 5 | 3 | {exact:.4g} |" in table(models, [verdict])


def test_raters_together_count_each_question_once(sheet, tmp_path):
    second, third = tmp_path / "second.csv", tmp_path / "third.csv"
    for other in (second, third):
        other.write_bytes(sheet.read_bytes())
    fill(sheet, lambda row: "A" if row["A"][0] == "t" else "B")
    fill(second, lambda row: "A" if row["A"][0] == "t" else "B")
    fill(third, lambda row: "B" if row["A"][0] == "t" else "A")
    together = read_blind([sheet, second, third])[1][-1]
    assert (together.wins, together.ties, together.losses) == (N, 0, 0)
    tied = read_blind([sheet, third])[1][-1]
    assert (tied.wins, tied.ties, tied.losses, tied.p_value) == (0, N, 0, 1.0)


def test_the_sign_test_leaves_ties_out_and_knows_even_counts():
    assert Verdict("x", 3, 100, 3, 0).p_value == 1.0
    assert Verdict("x", 5, 0, 0, 0).p_value == pytest.approx(2 / 2**5)


@pytest.mark.parametrize(("value", "words"), [("C", "allowed: A, B, tie"), ("yes", "allowed: A, B, tie")])
def test_a_judgement_that_is_none_is_named(sheet, value, words):
    fill(sheet, lambda row: value if row["number"] == "7" else "")
    with pytest.raises(DataError, match=rf"sheet.csv:\d+: better is '{value}'; {words}"):
        read_blind([sheet])


def test_a_sheet_without_its_key_or_columns_is_refused(sheet, tmp_path):
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "sheet.csv"
    copy.write_bytes(sheet.read_bytes())
    with pytest.raises(ConfigError, match="--key"):
        read_blind([copy])
    assert read_blind([copy], sheet.parent / "key.json")[1][0].unrated == N
    copy.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column number and better"):
        read_blind([copy], sheet.parent / "key.json")


def test_a_filled_sheet_is_never_overwritten(sheet):
    key, blank = sheet.parent / "key.json", sheet.read_bytes()
    assert written(sheet.parent).read_bytes() == blank
    fill(sheet, lambda row: "A")
    filled, known = sheet.read_bytes(), key.read_bytes()
    for seed in (3, 4):
        with pytest.raises(ConfigError, match="raters may have filled the sheet"):
            written(sheet.parent, seed)
        assert (sheet.read_bytes(), key.read_bytes()) == (filled, known)
    sheet.unlink()  # given to a rater: another key would not be that of the sheet
    with pytest.raises(ConfigError, match=r"key\.json is there"):
        written(sheet.parent, 4)
    assert (sheet.exists(), key.read_bytes()) == (False, known)


def test_a_sheet_is_read_with_its_own_key_alone(sheet, tmp_path):
    other = written(tmp_path / "other", seed=4).parent / "key.json"
    fill(sheet, lambda row: "A")
    with pytest.raises(DataError, match=r"sheet.csv:\d+: the row is of the sheet s\w{8}, and the key of s\w{8}; --key"):
        read_blind([sheet], other)
    assert read_blind([sheet])[1][0].unrated == 0


def test_the_command_writes_and_reads_the_sheet(sftmix, finished, tmp_path):
    words = ["generate", str(finished.path), "--format", "blind", "--to", str(tmp_path / "b"), "--max_new_tokens", "3"]
    refused = sftmix(*words)
    assert refused.code == 2
    assert "--models target,baseline" in refused.err
    assert sftmix(*words, "--models", "target,baseline").code == 0
    done = sftmix("generate", "--read_blind", str(tmp_path / "b" / "sheet.csv"))
    assert "| 0 | 0 | 0 | 11 | 1 |" in done.out
    sheet = str(tmp_path / "b" / "sheet.csv")
    for more, told in (
        (["--read_blind", sheet, "--to", "x"], "--read_blind and --to (x) exclude each other"),
        ([str(finished.path), "--read_blind", sheet], "--read_blind and RUN_OR_MODEL"),
        (["--read_blind", sheet, "--models", "base"], "--read_blind and --models (base) exclude each other"),
        (["--read_blind", sheet, "--format", "blind"], "--read_blind and --format (blind) exclude each other"),
        (["--read_blind", sheet, "--temperature", "0.5"], "--read_blind and --temperature (0.5) exclude each other"),
        ([str(finished.path), "--to", "x", "--key", "k.json"], "--key is k.json, but it belongs to --read_blind"),
    ):
        wrong = sftmix("generate", *more)
        assert (wrong.code, told in wrong.err) == (2, True), wrong.err
