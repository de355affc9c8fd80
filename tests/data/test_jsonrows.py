"""JSON lines and arrays: the place of each row and of each mistake, and what no row can make of the others."""

from __future__ import annotations

import gzip
import json
import time

import pytest

from sftmix.data.jsonrows import MAX_ROW_BYTES, StrictDecoder
from tests.data.test_rows import GOOD

GOOD_ROW = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=repr)
def test_the_column_of_a_mistake_is_that_on_its_line(end):
    problem = StrictDecoder().decode_line(b'{"instruction":"a","input":""' + end)
    assert str(problem) == "not valid JSON: Expecting ',' delimiter (column 30)"


def test_many_keys_and_one_twice_are_read_in_seconds():
    line = ("{" + ", ".join(f'"k{number}": 0' for number in range(200_000)) + ', "k199999": 1}').encode()
    began = time.process_time()
    problem = StrictDecoder().decode_line(line)
    assert str(problem) == "the key 'k199999' occurs twice in one object"
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "content", [GOOD + b"\n \n" + GOOD, GOOD.replace(b"\n", b"\r\n") * 2, b"\xef\xbb\xbf" + GOOD * 2]
)
def test_blank_lines_crlf_and_bom_are_fine(content, write, read):
    assert len(read(write("rows.jsonl", content)).train.records) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt"])
@pytest.mark.parametrize(("encode", "reason"), [("utf-16", "UTF-16"), ("gzip", "gzip")])
def test_other_encodings_are_named(name, encode, reason, write, refused):
    path = write(name, gzip.compress(GOOD) if encode == "gzip" else GOOD.decode().encode(encode))
    assert refused(path)[1].startswith(f"{path}:1: {reason}")


# ------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": "a" "output"}]', 3, "delimiter"),
        ('[\n{"instruction": "a", "output": "b"}\n', 3, "the file ends"),
        ('[\n{"instruction": "a", "output": "b"},\n]', 3, "Expecting value"),
        ('[\n{"instruction": "a", "output": "b"}\n]\n[]', 4, "after the end"),
        ('[\n{"instruction": "a\n"}]', 2, "Invalid control character"),
        ('[\n{"instruction": "a", "n": ' + "1" * 5000 + "}]", 2, "Exceeds the limit"),
        ("[\n" + "[" * 200_000, 2, "nested too deeply"),
    ],
    ids=range(7),
)
def test_a_broken_array_is_refused_at_its_line_even_when_skipping(text, line, reason, write, refused):
    path = write("rows.json", text)
    (message,) = refused(path, skip_bad=True)
    assert message.startswith(f"{path}:{line}: not valid JSON: ")
    assert reason in message


def test_an_array_that_is_not_utf8(write, refused):
    path = write("rows.json", b'[\n{"instruction": "\xff"}]')
    assert refused(path)[0].startswith(f"{path}:2: not valid UTF-8")


def test_bad_elements_of_an_array_are_named_by_line(write, refused):
    long = json.dumps("a" * MAX_ROW_BYTES)
    rows = f'[\n{json.dumps(GOOD_ROW)},\n{{"instruction": "a", "output": null}},\n{{"x": 1, "x": 2}},\n7,{long}]'
    path = write("rows.json", rows)
    lines = refused(path)
    assert lines[1:] == [
        f"{path}:3: output must be a string, found null",
        f"{path}:4: the key 'x' occurs twice in one object",
        f"{path}:5: expected an object with named fields, found a number (int)",
        f"{path}:5[4]: a row of 16,777,218 characters; the limit is 16,777,216",
    ]


def test_rows_on_one_line_have_their_index_and_the_ids_do_not(write, read):
    """The first on a line is `file:line`; an index counts from the beginning of the array."""
    good = [{"instruction": f"a{i}", "output": "b"} for i in range(4)]
    one_line, lines = (read(write(name, good)).train for name in ("one.json", "lines.jsonl"))
    assert one_line.values("id") == lines.values("id")
    row = json.dumps(good[0])
    mixed = read(write("several.json", f"[{row},\n{row}, {row},\n\n{row}]")).train
    assert [place.rpartition(":")[2] for place in mixed.values("source")] == ["1", "2", "2[2]", "4"]


def test_long_arrays_are_those_of_the_same_lines(write, read):
    rows = [{"instruction": f"{i} é€😀" * (i % 211), "output": f"{i} ok"} for i in range(1, 3000) if i % 211]
    train = read(write("rows.json", json.dumps(rows, ensure_ascii=False).encode())).train
    messages = [example.messages for _, _, example in train.examples(train.records, whole=True)]
    assert [(m[0].content, m[1].content) for m in messages] == [(row["instruction"], row["output"]) for row in rows]
