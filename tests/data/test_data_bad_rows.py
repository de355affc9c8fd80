"""Every kind of broken input is refused with file, line and reason, or dropped and counted; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftmix.common.errors import DataError
from sftmix.data.jsonrows import MAX_ROW_BYTES
from sftmix.data.rows import prepare

GOOD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'


def turns(*pairs: tuple[object, object]) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}).encode()


def reply(content: object) -> bytes:
    return turns(("user", "Hi"), ("assistant", content))


BAD_LINES = {
    "truncated": (GOOD[:40], "not valid JSON"),
    "invalid UTF-8": (GOOD.replace(b"Yo", b"\xff\xfe").strip(), "not valid UTF-8: byte 0xff"),
    "lone surrogate": (
        rb'{"messages":[{"role":"user","content":"\ud800"},{"role":"assistant","content":"a"}]}',
        "lone",
    ),
    "NUL escape": (reply("a\0b"), "NUL"),
    "raw NUL": (GOOD.replace(b"Yo", b"Y\0").strip(), "not valid JSON"),
    "duplicate keys": (b'{"messages": [], ' + GOOD[1:].strip(), "'messages' occurs twice"),
    "content int": (reply(3), "must be a string, found a number"),
    "content bool": (reply(True), "found a boolean"),
    "content null": (reply(None), "found null"),
    "content list": (reply(["a"]), "found a list"),
    "content empty list": (reply([]), "found a list"),
    "part without type": (reply([{"text": "a"}]), "messages[1].content[0] has no 'type'"),
    "part without text": (reply([{"type": "text"}]), "messages[1].content[0] has no 'text'"),
    "part with null": (reply([{"type": "text", "text": None}]), "content[0].text must be a string, found null"),
    "image": (
        reply([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[1].content[1] is a part of type 'image_url'; only parts of type 'text' are read",
    ),
    "audio": (reply([{"type": "input_audio"}]), "is a part of type 'input_audio'"),
    "content dict": (reply({"text": "a"}), "found an object"),
    "missing messages": (b'{"message": 1}', "'messages' is missing"),
    "empty messages": (b'{"messages": []}', "messages is empty"),
    "messages is text": (b'{"messages": "Hi"}', "must be a list of turns"),
    "a turn is text": (b'{"messages": ["Hi"]}', "must be an object"),
    "no content": (b'{"messages": [{"role": "user"}]}', "has no 'content'"),
    "empty user": (turns(("user", ""), ("assistant", "a")), "turn 1 (user) is empty"),
    "blank user": (turns(("user", " \n"), ("assistant", "a")), "turn 1 (user) is empty"),
    "unknown role": (turns(("user", "Hi"), ("tool", "a")), "'tool'"),
    "role is a number": (turns((1, "Hi"), ("assistant", "a")), "role is 1"),
    "no assistant": (turns(("user", "Hi")), "no assistant turn"),
    "assistant first": (turns(("assistant", "Hi"), ("user", "a"), ("assistant", "b")), "expected user's"),
    "same role twice": (turns(("user", "Hi"), ("user", "a"), ("assistant", "b")), "expected assistant's"),
    "system not first": (turns(("user", "Hi"), ("system", "a"), ("assistant", "b")), "turn 2 is system's"),
    "two objects": (GOOD.strip() + GOOD.strip(), "Extra data"),
    "array line": (b"[" + GOOD.strip() + b"]", "expected an object"),
    "scalar line": (b"42", "expected an object"),
    "trailing comma": (GOOD.strip()[:-1] + b",}", "not valid JSON"),
    "single quotes": (GOOD.strip().replace(b'"', b"'"), "not valid JSON"),
    "NaN": (GOOD.strip()[:-1] + b', "score": NaN}', "NaN is not JSON"),
    "Infinity": (GOOD.strip()[:-1] + b', "score": -Infinity}', "Infinity is not JSON"),
    "depth 2000": (b'{"messages": ' + b"[" * 2000 + b"]" * 2000 + b"}", "nested too deeply"),
    "deeper": (b'{"messages": ' + b"[" * 200000, "nested too deeply"),
    "huge number": (b'{"messages": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "20 MB line": (reply("a" * (MAX_ROW_BYTES + 4_000_000)), "bytes; the limit is"),
    "tool calls": (GOOD.strip().replace(b'"Yo"', b'"Yo", "tool_calls": [{"x": 1}]'), "tool_calls"),
    "id null": (b'{"id": null, ' + GOOD[1:].strip(), "id must be a string, found null"),
    "id bool": (b'{"id": true, ' + GOOD[1:].strip(), "id must be a string, found a boolean"),
    "id reserved": (b'{"id": "a@turn0", ' + GOOD[1:].strip(), "@turn"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_named_or_skipped_and_counted(kind, write, options):
    line, reason = BAD_LINES[kind]
    path = write("rows.jsonl", GOOD + b"\n" + line + b"\r\n" + GOOD)
    with pytest.raises(DataError) as caught:
        prepare(options(path), 0, progress=False)
    message = str(caught.value)
    assert f"{path}:3: " in message
    assert reason in message.split(f"{path}:3: ")[1]
    assert "1 bad row " in message
    prepared = prepare(options(path, skip_bad=True), 0, progress=False)
    assert prepared.report.counts["bad_row"] == 1
    assert len(prepared.train.records) == 2


def test_the_first_twenty_and_the_count(write, options):
    path = write("rows.jsonl", GOOD + b"{}\n" * 33)
    with pytest.raises(DataError) as caught:
        prepare(options(path), 0, progress=False)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("33 bad rows")
    assert [line.split(": ")[0] for line in lines[1:21]] == [f"{path}:{n}" for n in range(2, 22)]
    assert lines[21] == "... and 13 more"
    assert prepare(options(path, skip_bad=True), 0, progress=False).report.counts["bad_row"] == 33


@pytest.mark.parametrize(
    "content", [GOOD + b"\n \n" + GOOD, GOOD.replace(b"\n", b"\r\n") * 2, b"\xef\xbb\xbf" + GOOD * 2]
)
def test_blank_lines_crlf_and_bom_are_fine(content, write, options):
    assert len(prepare(options(write("rows.jsonl", content)), 0, progress=False).train.records) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(("encode", "reason"), [("utf-16", "UTF-16"), ("gzip", "gzip")])
def test_other_encodings_are_named(name, encode, reason, write, options):
    import gzip

    content = gzip.compress(GOOD) if encode == "gzip" else GOOD.decode().encode(encode)
    path = write(name, content)
    with pytest.raises(DataError, match=f"{name}:1: {reason}"):
        prepare(options(path), 0, progress=False)


def test_files_that_cannot_be_read_are_named(write, options, tmp_path: Path):
    for path, reason in [
        (str(tmp_path / "missing.jsonl"), "no such file"),
        ("data/missing.json", "no such file"),
        ("../../no-such-name", "no such file"),
        ("a\0b", "no such file"),
        (write("empty.jsonl", b""), "empty"),
        (write("rows.jsonl.gz", GOOD), "'.gz' are not read"),
        (write("rows.md", GOOD), "are not read"),
        (write("blank.jsonl", b"\n\n"), "no usable row"),
        (write("noarray.json", "[]"), "no usable row"),
        (write("rows.parquet", b"PAR1 nothing"), "not a readable Parquet file"),
    ]:
        with pytest.raises(DataError, match=reason) as caught:
            prepare(options(path), 0, progress=False)
        assert Path(path).name in str(caught.value) or "data.train" in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no file ending in .*\.jsonl"):
        prepare(options(str(tmp_path / "folder")), 0, progress=False)


def test_a_hub_id_without_network_says_so(options):
    with pytest.raises(DataError, match=r"someone/some-dataset.*hub id.*without a network"):
        prepare(options("someone/some-dataset"), 0, progress=False)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": "a" "output"}]', 3, "delimiter"),
        ('[\n{"instruction": "a", "output": "b"}\n', 3, "the file ends"),
        ('[\n{"instruction": "a", "output": "b"},\n]', 3, "Expecting value"),
        ('[\n{"instruction": "a", "output": "b"}\n]\n[]', 4, "after the end"),
    ],
)
def test_a_broken_array_is_refused_at_its_line_even_when_skipping(text, line, reason, write, options):
    path = write("rows.json", text)
    with pytest.raises(DataError) as caught:
        prepare(options(path, skip_bad=True), 0, progress=False)
    assert f"{path}:{line}: not valid JSON" in str(caught.value)
    assert reason in str(caught.value)


def test_bad_elements_of_an_array_are_named_by_line(write, options):
    rows = '[\n{"instruction": "a", "output": "b"},\n{"instruction": "a", "output": null},\n{"x": 1, "x": 2},\n7]'
    path = write("rows.json", rows)
    with pytest.raises(DataError) as caught:
        prepare(options(path), 0, progress=False)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        f"{path}:3: output must be a string, found null",
        f"{path}:4: the key 'x' occurs twice in one object",
        f"{path}:5: expected an object with named fields, found a number (int)",
    ]


def test_long_arrays_are_read_in_pieces(write, options):
    """Rows and multi-byte characters that fall on the edges of the reader's pieces."""
    rows = [{"instruction": f"{i} é€😀" * (i % 211), "output": f"{i} ok"} for i in range(1, 3000) if i % 211]
    path = write("rows.json", json.dumps(rows, ensure_ascii=False).encode())
    prepared = prepare(options(path), 0, progress=False)
    read = [prepared.train.example(r).messages for r in prepared.train.records.tolist()]
    assert [(m[0].content, m[1].content) for m in read] == [(row["instruction"], row["output"]) for row in rows]


def test_csv_rows(write, options):
    path = write("rows.csv", b'instruction,input,output,score\n"Say\nhi",,Hi,3\nA,B\n"q,",x,\xff,1\n"open')
    with pytest.raises(DataError) as caught:
        prepare(options(path), 0, progress=False)
    lines = str(caught.value).splitlines()[1:]
    assert lines[0] == f"{path}:4: 2 fields, but the header has 4"
    assert lines[1].startswith(f"{path}:5: output contains a lone surrogate or bytes that are not UTF-8")
    assert lines[2].startswith(f"{path}:6: not valid CSV")


def test_explicit_id_twice_is_an_error_and_content_ids_count(write, options):
    rows = [
        {"id": 7, "instruction": "a", "output": "b"},
        {"instruction": "a", "output": "c"},
        {"id": "7", "instruction": "x", "output": "y"},
        {"instruction": "a", "output": "c"},
        {"instruction": "a", "output": "c"},
    ]
    path = write("rows.jsonl", rows)
    with pytest.raises(DataError, match=f"{path}:3: the id '7' is taken by an earlier row"):
        prepare(options(path), 0, progress=False)
    prepared = prepare(options(path, skip_bad=True), 0, progress=False)
    ids = [prepared.train.id(r) for r in prepared.train.records.tolist()]
    assert ids[0] == "7"
    assert ids[2:] == [ids[1] + "#1", ids[1] + "#2"]
    assert prepared.report.counts == {"bad_row": 1, "duplicate": 2}


def test_empty_responses_are_dropped_and_counted(write, options):
    rows = [{"instruction": "a", "output": out} for out in ("b", "", " \n", "c")]
    prepared = prepare(options(write("rows.jsonl", rows)), 0, progress=False)
    assert prepared.report.counts == {"empty_response": 2}
    assert prepared.report.rows == 4
    with pytest.raises(DataError, match=r"(?s)no usable row is left.*empty responses"):
        prepare(options(write("none.jsonl", rows[1:3])), 0, progress=False)
