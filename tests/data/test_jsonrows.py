"""JSON lines and arrays: the place of each row and of each mistake, and what no row can make of the others."""

import json

import pytest

from sftmix.data.jsonrows import MAX_ROW_BYTES
from tests.data.test_rows import GOOD

GOOD_ROW = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    "content", [GOOD + b"\n \n" + GOOD, GOOD.replace(b"\n", b"\r\n") * 2, b"\xef\xbb\xbf" + GOOD * 2]
)
def test_blank_lines_crlf_and_bom_are_fine(content, write, read):
    assert len(read(write("rows.jsonl", content)).train.records) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_other_encodings_are_bad_rows(name, write, refused):
    assert "UTF-8" in refused(write(name, GOOD.decode().encode("utf-16")))[1]


# ------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": "a" "output"}]', 3, "delimiter"),
        ('[\n{"instruction": "a", "output": "b"}\n', 3, "neither ',' nor"),
        ('[\n{"instruction": "a", "output": "b"},\n]', 3, "Expecting value"),
        ('[\n{"instruction": "a", "output": "b"}\n]\n[]', 3, "neither ',' nor"),
        ('[\n{"instruction": "a\n"}]', 2, "Invalid control character"),
        ('[\n{"instruction": "a", "n": ' + "1" * 5000 + "}]", 2, "Exceeds the limit"),
        ("[\n" + "[" * 200_000, 2, "recursion"),
    ],
    ids=range(7),
)
def test_a_broken_array_is_refused_at_its_line_even_when_skipping(text, line, reason, write, refused):
    path = write("rows.json", text)
    (message,) = refused(path, skip_bad=True)
    assert message.startswith(f"{path}:{line}: not valid JSON: ")
    assert reason in message


def test_bytes_of_an_array_that_are_not_utf8_are_those_of_a_bad_row(write, refused):
    path = write("rows.json", b'[\n{"instruction": "a", "output": "b"},\n{"instruction": "\xff", "output": "b"}]')
    assert refused(path)[1].startswith(f"{path}:3: instruction contains a lone surrogate or bytes that are not UTF-8")


def test_bad_elements_of_an_array_are_named_by_line(write, refused):
    long = json.dumps("a" * MAX_ROW_BYTES)
    rows = f'[\n{json.dumps(GOOD_ROW)},\n{{"instruction": "a", "output": null}},\n7,{long}]'
    path = write("rows.json", rows)
    lines = refused(path)
    assert lines[1:] == [
        f"{path}:3: output must be a string, found null",
        f"{path}:4: expected an object with named fields, found a number (int)",
        f"{path}:4[3]: a row of 16,777,218 characters; the limit is 16,777,216",
    ]


def test_rows_on_one_line_have_their_index_and_the_ids_do_not(write, read):
    """The first on a line is `file:line`; an index counts from the beginning of the array."""
    good = [{"instruction": f"a{i}", "output": "b"} for i in range(4)]
    one_line, lines = (read(write(name, good)).train for name in ("one.json", "lines.jsonl"))
    assert one_line.values("id") == lines.values("id")
    row = json.dumps(good[0])
    mixed = read(write("several.json", f"[{row},\n{row}, {row},\n\n{row}]")).train
    assert [place.rpartition(":")[2] for place in mixed.values("source")] == ["1", "2", "2[2]", "4"]
