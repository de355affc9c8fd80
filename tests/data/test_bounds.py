"""Rows that are too large, and names that are there twice, are bad rows in every format; others are read."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from sftmix.data import row_files, sources
from sftmix.text.values import BadRow
from sftmix.words.errors import DataError

GOOD, LARGE = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 3000}


def write(place: Path, rows: list[dict]) -> None:
    if place.suffix == ".jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif place.suffix == ".json":
        place.write_text(json.dumps(rows))
    elif place.suffix == ".csv":
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, GOOD)
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), place)


def read(place: Path) -> list:
    ((source,), _) = sources.expand([str(place)], "data.train")
    return [row for _, row in source.rows()]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_row_has_a_largest_size(ending, nested, tmp_path, monkeypatch):
    for module in (row_files, sources):
        monkeypatch.setattr(module, "MAX_ROW", 2000)
    large = {**LARGE, "completion": [{"text": LARGE["completion"]}]} if nested and ending != ".csv" else LARGE
    write(tmp_path / f"rows{ending}", [GOOD, large, GOOD] if large is LARGE or ending != ".parquet" else [large])
    found = read(tmp_path / f"rows{ending}")
    bad = [row for row in found if isinstance(row, BadRow)]
    assert len(bad) == 1
    assert any(words in str(bad[0]) for words in ("limit is 2,000", "over 2,000 bytes", "field larger than"))
    assert [row for row in found if not isinstance(row, BadRow)] == [GOOD] * (len(found) - 1)


def test_a_document_is_a_row_of_its_own_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW", 10)
    (tmp_path / "a.txt").write_text("b" * 100)
    assert read(tmp_path / "a.txt") == [{"text": "b" * 100}]


@pytest.mark.parametrize(
    "twice", ['{"prompt": "a", "completion": "b", "completion": "c"}', '{"prompt": [{"x": 1, "x": 1}]}']
)
def test_a_key_that_is_there_twice_is_refused(twice, tmp_path):
    lines = [json.dumps(GOOD), twice, json.dumps(GOOD)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    first, bad, last = read(tmp_path / "rows.jsonl")
    assert (first, last) == (GOOD, GOOD)
    assert "is twice in one object; write it once" in str(bad)
    (tmp_path / "rows.json").write_text(f"[{','.join(lines)}]")
    with pytest.raises(DataError, match=r"rows.json: not valid JSON: .* is twice in one object; write it once: {'"):
        read(tmp_path / "rows.json")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_column_that_is_there_twice_is_refused(ending, tmp_path):
    place = tmp_path / f"rows{ending}"
    if ending == ".csv":
        place.write_text("prompt,completion,completion\na,b,c\n")
    else:
        parquet.write_table(pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"]), place)
    with pytest.raises(DataError, match="the column 'completion' is there twice"):
        read(place)
