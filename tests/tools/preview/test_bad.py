"""`preview --bad`: every bad row, and what was dropped, cut or not read, whatever the cache holds."""

import csv
import json
from collections import Counter


def test_every_bad_row_is_in_the_table_with_a_reason(sftmix, tiny, tmp_path):
    good = {"instruction": "Say it.", "output": "It is said."}
    long = {"instruction": "Say it.", "output": "It is said. " * 400}
    lines = [good, *[{"instruction": "=x"}] * 8, {**good, "date": "1"}, {**good, "output": " "}, long]
    rows, bad = tmp_path / "rows.jsonl", tmp_path / "bad.csv"
    rows.write_text("".join(json.dumps(row) + "\n" for row in lines))
    words = ("preview", "--model.path", str(tiny.model), "--data.train", str(rows), "--data.max_length", "64")
    assert sftmix(*words).code == 3, "bad rows stop a run"
    for _ in range(2):
        done = sftmix(*words, "--bad", str(bad))
        assert done.code == 0, done.err
        assert "13 lines" in done.err or "12 lines" in done.err
        with bad.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        places = {line["reason"]: line["source"] for line in found}
        reasons = Counter(line["reason"] for line in found)
        assert reasons["bad row skipped"] == 8
        assert places["empty response dropped"] == f"{rows}:11"
        assert (places["field not read"], found[8]["detail"]) == (f"{rows}:10", "'date'")
        assert places["example cut at data.max_length"] == f"{rows}:12"
        bad.unlink()


def test_the_table_is_written_if_no_row_is_left(sftmix, tiny, tmp_path):
    rows, bad = tmp_path / "rows.jsonl", tmp_path / "bad.csv"
    rows.write_text('{"instruction": "x"}\n' * 7)
    words = ("preview", "--model.path", str(tiny.model), "--data.train", str(rows), "--bad", str(bad))
    done = sftmix(*words)
    assert (done.code, len(bad.read_text().splitlines())) == (3, 8)


def test_a_table_that_cannot_be_written_is_refused_first(sftmix, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("--model.path", str(tiny.model), "--data.train", str(tiny.train))
    done = sftmix("preview", *words, "--bad", str(tmp_path / "file" / "bad.csv"))
    assert (done.code, "--bad" in done.err) == (2, True)


def test_a_field_that_is_not_read_has_one_line(sftmix, tiny, tmp_path):
    """Two further columns of 500 rows had 1,000 lines, among which bad rows were lost."""
    rows, bad = tmp_path / "rows.jsonl", tmp_path / "bad.csv"
    good = {"instruction": "Say it.", "output": "It is said.", "lang": "en"}
    lines = [{**good, "output": f"It is {k}.", "date": k} for k in range(300)] + [
        {"instruction": "x", "date": 1},
        {**good, "note": 1},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in lines))
    done = sftmix("preview", "--model.path", str(tiny.model), "--data.train", str(rows), "--bad", str(bad))
    assert done.code == 0, done.err
    with bad.open(newline="", encoding="utf-8") as file:
        found = [(line["source"].rpartition(":")[2], line["detail"]) for line in csv.DictReader(file)]
    assert found[:2] == [("1", "'date', in 300 rows"), ("1", "'lang', in 301 rows")]
    assert (found[3], len(found)) == (("302", "'note'"), 4)
