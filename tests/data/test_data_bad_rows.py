"""Every kind of broken input is refused with file, line and reason, or dropped and counted; never a traceback."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from sftmix.common.errors import DataError
from sftmix.data.jsonrows import MAX_ROW_BYTES, StrictDecoder
from sftmix.data.report import DataReport
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
    "content null": (reply(None), "found null"),
    "content list": (reply(["a"]), "found a list"),
    "content empty list": (reply([]), "found a list"),
    "part without type": (reply([{"text": "a"}]), "messages[1].content[0] has no 'type'"),
    "part without text": (reply([{"type": "text"}]), "messages[1].content[0] has no 'text'"),
    "image": (
        reply([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[1].content[1] is a part of type 'image_url'; only parts of type 'text' are read",
    ),
    "missing messages": (b'{"message": 1}', "'messages' is missing"),
    "empty messages": (b'{"messages": []}', "messages is empty"),
    "messages is text": (b'{"messages": "Hi"}', "must be a list of turns"),
    "a turn is text": (b'{"messages": ["Hi"]}', "must be an object"),
    "no content": (b'{"messages": [{"role": "user"}]}', "has no 'content'"),
    "blank user": (turns(("user", " \n"), ("assistant", "a")), "turn 1 (user) is empty"),
    "unknown role": (turns(("user", "Hi"), ("tool", "a")), "'tool'"),
    "no assistant": (turns(("user", "Hi")), "no assistant turn"),
    "assistant first": (turns(("assistant", "Hi"), ("user", "a"), ("assistant", "b")), "expected user's"),
    "same role twice": (turns(("user", "Hi"), ("user", "a"), ("assistant", "b")), "expected assistant's"),
    "system not first": (turns(("user", "Hi"), ("system", "a"), ("assistant", "b")), "turn 2 is system's"),
    "two objects": (GOOD.strip() + GOOD.strip(), "Extra data"),
    "scalar line": (b"42", "expected an object"),
    "NaN": (GOOD.strip()[:-1] + b', "score": NaN}', "NaN is not JSON"),
    "depth 2000": (b'{"messages": ' + b"[" * 2000 + b"]" * 2000 + b"}", "nested too deeply"),
    "deeper": (b'{"messages": ' + b"[" * 200000, "nested too deeply"),
    "huge number": (b'{"messages": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "20 MB line": (reply("a" * (MAX_ROW_BYTES + 4_000_000)), "bytes; the limit is"),
    "tool calls": (GOOD.strip().replace(b'"Yo"', b'"Yo", "tool_calls": [{"x": 1}]'), "tool_calls"),
    "function call": (GOOD.strip().replace(b'"Yo"', b'"Yo", "function_call": {"name": "x"}'), "has function_call"),
    "tools": (b'{"tools": [{"type": "function"}], ' + GOOD[1:].strip(), "field 'tools' lists tools"),
    "half a weight": (GOOD.strip().replace(b'"Yo"', b'"Yo", "weight": 0.5'), "messages[1].weight is 0.5; known are 0"),
    "no turn with a weight": (GOOD.strip().replace(b'"Yo"', b'"Yo", "weight": 0'), "no assistant turn to train on"),
    "surrogate elsewhere": (rb'{"note": "\ud800", ' + GOOD[1:].strip(), "field 'note' contains a lone surrogate"),
    "surrogate in a name": (rb'{"\ud800": 1, ' + GOOD[1:].strip(), r"the name of the field '\ud800' contains a lone"),
    "id null": (b'{"id": null, ' + GOOD[1:].strip(), "id must be a string, found null"),
    "id of a terminal": (rb'{"id": "x\u001b]0;t\u0007", ' + GOOD[1:].strip(), r"the control character '\x1b'"),
    "id of two lines": (rb'{"id": "x\n0 bad rows", ' + GOOD[1:].strip(), r"the control character '\n'"),
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


def test_quoted_values_are_cut(write, options):
    """A message is for people; a row may have 16 MiB."""
    long = "a\x1b" * 100_000
    rows = [
        turns(("user", "Hi"), (long, "Yo")),
        reply([{"type": long}]),
        b'{"id": "' + b"a" * 99_999 + b'@turn1", ' + GOOD[1:].strip(),
        json.dumps({long: 1}).encode(),
        b'{"%b": 1, "%b": 2}' % (b"k" * 99_999, b"k" * 99_999),
    ]
    message = "\n".join(messages_of(write("rows.jsonl", b"\n".join([GOOD.strip(), *rows])), options))
    assert "5 bad rows" in message
    assert len(message) < 2000
    assert "\x1b" not in message


def test_a_label_has_no_control_character(write, options):
    path = write("rows.jsonl", [{"instruction": "a", "output": "b", "good": "x\n0 bad rows"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: good contains the control character '\\n'"):
        prepare(options(path, label_field="good"), 0, progress=False)


def test_the_first_twenty_and_the_count(write, options):
    path = write("rows.jsonl", GOOD + b"{}\n[]\n" * 16 + b"{}\n")
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


@pytest.mark.parametrize("rest", ["", " " * MAX_ROW_BYTES])
def test_a_number_of_many_digits_is_not_called_deep(rest, write, options):
    path = write("rows.json", f'[{{"instruction": "a", "output": "b", "n": {"1" * 5000}}}]{rest}')
    with pytest.raises(DataError, match=r"rows.json:1: not valid JSON: Exceeds the limit"):
        prepare(options(path), 0, progress=False)


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


def test_rows_on_one_line_have_their_index_and_the_ids_do_not(write, options):
    """The first on a line is `file:line`; an index counts from the beginning of the array."""
    good = [{"instruction": f"a{i}", "output": "b"} for i in range(4)]
    path = write("rows.json", json.dumps([*good, {"instruction": "c", "output": None}, 7]))
    with pytest.raises(DataError) as caught:
        prepare(options(path), 0, progress=False)
    assert str(caught.value).splitlines()[1:] == [
        f"{path}:1[4]: output must be a string, found null",
        f"{path}:1[5]: expected an object with named fields, found a number (int)",
    ]
    one_line = prepare(options(write("one.json", json.dumps(good))), 0, progress=False).train
    lines = prepare(options(write("lines.jsonl", good)), 0, progress=False).train
    records = one_line.records.tolist()
    assert [one_line.id(r) for r in records] == [lines.id(r) for r in records]
    assert [one_line.source(r).rpartition(":")[2] for r in records] == ["1", "1[1]", "1[2]", "1[3]"]
    row = json.dumps(good[0])
    several = write("several.json", f"[{row},\n{row}, {row},\n\n{row}]")
    mixed = prepare(options(several), 0, progress=False).train
    places = [mixed.source(r).rpartition(":")[2] for r in mixed.records.tolist()]
    assert places == ["1", "2", "2[2]", "4"]


@pytest.mark.parametrize(
    ("end", "place"), [('{"x" 1}]', "1[2]: not valid JSON: Expecting"), ("\n{1}]", "2: not valid JSON: Expecting")]
)
def test_a_syntax_error_names_the_row_on_its_line(end, place, write, options):
    row = json.dumps({"instruction": "a", "output": "b"})
    path = write("rows.json", f"[{row}, {row}, {end}")
    with pytest.raises(DataError) as caught:
        prepare(options(path), 0, progress=False)
    assert f"{path}:{place}" in str(caught.value)


def test_long_arrays_are_read_in_pieces(write, options):
    """Rows and multi-byte characters that fall on the edges of the reader's pieces."""
    rows = [{"instruction": f"{i} é€😀" * (i % 211), "output": f"{i} ok"} for i in range(1, 3000) if i % 211]
    path = write("rows.json", json.dumps(rows, ensure_ascii=False).encode())
    prepared = prepare(options(path), 0, progress=False)
    read = [prepared.train.example(r).messages for r in prepared.train.records.tolist()]
    assert [(m[0].content, m[1].content) for m in read] == [(row["instruction"], row["output"]) for row in rows]


def test_csv_rows(write, options):
    path = write("rows.csv", b'instruction,input,output,score\n"Say\nhi",,Hi,3\nA,B\n"q,",x,\xff,1\nq,x,y,\xff\n"open')
    with pytest.raises(DataError) as caught:
        prepare(options(path), 0, progress=False)
    lines = str(caught.value).splitlines()[1:]
    assert lines[0] == f"{path}:4: 2 fields, but the header has 4"
    assert lines[1].startswith(f"{path}:5: output contains a lone surrogate or bytes that are not UTF-8")
    assert lines[2].startswith(f"{path}:6: field 'score' contains a lone surrogate or bytes that are not UTF-8")
    assert lines[3].startswith(f"{path}:7: not valid CSV")


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


def test_no_name_in_the_report_adds_a_line_or_a_colour():
    """The names of files and the words of a template come from others, too."""
    report = DataReport(notes=["The template writes '\x1b[31m' \t."])
    report.add("template_refused", "a (x\n0 bad rows.jsonl:1)", kinds=["\x9b2J"])
    lines = report.lines()
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(lines))
    assert len(lines) == 3
    assert lines[-1].endswith(r", \x9b2J in 1: a (x\n0 bad rows.jsonl:1)")


def test_empty_responses_are_dropped_and_counted(write, options):
    rows = [{"instruction": "a", "output": out} for out in ("b", "", " \n", "c")]
    prepared = prepare(options(write("rows.jsonl", rows)), 0, progress=False)
    assert prepared.report.counts == {"empty_response": 2}
    assert prepared.report.rows == 4
    with pytest.raises(DataError, match=r"(?s)no usable row is left.*empty responses"):
        prepare(options(write("none.jsonl", rows[1:3])), 0, progress=False)


# ---------------------------------------------------------------- a file whose every row has the same mistake


def messages_of(path: str | list[str], options, **more) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepare(options(*([path] if isinstance(path, str) else path), **more), 0, progress=False)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_one_mistake_of_every_row_is_told_once(suffix, write, options):
    rows = [{"instruction": f"Say {i}.", "answer": str(i), "n": i} for i in range(1200)]
    path = write(f"rows.{suffix}", [{**row, "extra": 1} if i == 3 else row for i, row in enumerate(rows)])
    there = "the fields there are 'instruction', 'answer', 'n', 'extra'"
    assert messages_of(path, options, format="alpaca") == [
        "1,200 bad rows (data.skip_bad drops and counts them):",
        f"{path}: all 1,200 rows: field 'output' is missing; {there}",
    ]


def test_fields_that_no_format_has_are_told_once(write, options):
    """Rows with other fields have the same mistake; the fields are told once, too, where the reason lists them all."""
    rows = [{"question": f"Say {i}.", "answer": str(i)} for i in range(50)]
    head, line = messages_of(write("a.jsonl", rows), options)
    assert head.startswith("50 bad rows")
    assert "a.jsonl: all 50 rows: format not recognised from the fields 'question', 'answer' (known are " in line
    assert line.endswith("name one with data.format, or say with data.columns which field is which")
    _, line = messages_of(write("b.jsonl", [*rows, {"question": "u", "hint": "h"}]), options)
    assert line.endswith("; the fields there are 'question', 'answer', 'hint'")


def test_a_file_with_a_good_row_or_two_mistakes_names_its_rows(write, options):
    good, none, null = {"prompt": "u", "completion": "a"}, {"prompt": "u"}, {"prompt": "u", "completion": None}
    for number, (rows, bad) in enumerate([([good, none, none], 2), ([none, null, none], 3), ([none], 1)]):
        path = write(f"{number}.jsonl", rows)
        lines = messages_of(path, options, format="prompt_completion")[1:]
        assert len(lines) == bad
        assert all(line.startswith((f"{path}:1: ", f"{path}:2: ", f"{path}:3: ")) for line in lines)


def test_files_are_told_apart_and_all_their_rows_are_counted(write, options):
    none = [{"prompt": "u"}] * 30
    whole, other = write("whole.jsonl", none), write("other.jsonl", none[:7])
    mixed = write("mixed.jsonl", [{"prompt": "u", "completion": "a"}, *none])
    lines = messages_of([whole, mixed, other], options, format="prompt_completion")
    assert lines[0].startswith("67 bad rows")
    assert lines[1] == f"{whole}: all 30 rows: field 'completion' is missing; the fields there are 'prompt'"
    assert lines[2] == f"{mixed}:2: field 'completion' is missing; 29 later rows of this file have the same mistake"
    assert lines[3:] == [f"{other}: all 7 rows: field 'completion' is missing; the fields there are 'prompt'"]
    prepared = prepare(options(whole, mixed, format="prompt_completion", skip_bad=True), 0, progress=False)
    assert prepared.report.counts == {"bad_row": 60}
    assert prepared.report.notes == [f"no row of {whole} is used: all are bad (data.skip_bad)"]
    assert prepared.report.rows == 61


@pytest.mark.parametrize(("end", "reason"), [(",", "no comma stands after a row"), ("\xe9", "save the file as UTF-8")])
def test_a_mistake_of_saving_is_told_once(end, reason, write, options):
    """Each line has its own column; the last has no comma."""
    lines = [f'{{"instruction": "{"x" * n}", "output": "a"}}' for n in range(30)]
    path = write("rows.jsonl", f"{end}\n".join(lines).encode("latin-1"))
    (line,) = messages_of(path, options)[1:]
    assert line.startswith(f"{path}:1: ")
    assert line.endswith(f"; {reason}; 28 later rows of this file have the same mistake")
