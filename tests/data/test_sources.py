"""Sources of rows: the place of each row and of each mistake in files of every kind, hub ids, and text files."""

import decimal
import gzip
import json
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.data.sources import Source, expand
from sftmix.words.errors import BadRow, DataError
from tests.data.test_rows import GOOD


def test_files_that_cannot_be_read_are_named(write, refused, tmp_path):
    for path, reason in [
        ("a\0b", "holds a control character"),
        (write("empty.jsonl", b""), "empty"),
        (write("rows.jsonl.gz", b"x"), "'.gz' are not read"),
        (write("blank.jsonl", b"\n\n"), "no usable row"),
        (write("noarray.json", "[ ]"), "no usable row"),
        (write("rows.parquet", b"PAR1 nothing"), "cannot be read behind its first 0 rows: "),
    ]:
        message = refused(path)[0]
        assert reason in message
        assert Path(path).name in message or "data.train" in message
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("About rows.")
    (message,) = refused(str(tmp_path / "folder"))
    assert message.endswith(
        "folder: no file in the directory is read (ending in .arrow, .csv, .json, .jsonl, .parquet, .txt); there "
        "are 'notes.md'; name files of rows, or their folders"
    )


@pytest.mark.parametrize("name", ["gone.json", "gone.jsonl", "gone.parquet", "gone.txt"])
def test_a_file_that_vanishes_is_named(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name}: cannot be read.*: .*[Nn]o such file"):
        list(Source(str(tmp_path / name), "digest", tmp_path / name).rows())


# --------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "content", [GOOD + b"\n \n" + GOOD, GOOD.replace(b"\n", b"\r\n") * 2, b"\xef\xbb\xbf" + GOOD * 2]
)
def test_blank_lines_crlf_and_bom_are_fine(content, write, read):
    assert len(read(write("rows.jsonl", content)).train.records) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding, write, refused):
    array, table = f"[{GOOD.decode()}]", "prompt,completion\na,b\n"
    for name, text in [("a.jsonl", GOOD.decode()), ("b.json", array), ("c.csv", table), ("d.txt", "A tale.")]:
        path = write(name, text.encode(encoding))
        reason = next(line for line in refused(path) if line.startswith(path))
        assert f"it is in {encoding.upper()}; save it as UTF-8" in reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": "a" "output"}]', "delimiter: line 3 column 21"),
        ('[\n{"instruction": "a", "output": "b"}\n', "Expecting ',' delimiter: line 3 column 1"),
        ('[\n{"instruction": "a", "output": "b"},\n]', "line "),
        ('[\n{"instruction": "a", "output": "b"}\n]\n[]', "Extra data: line 4 column 1"),
        ('[\n{"instruction": "a", "output": "b"}\n[7]]', "line 3 column 1"),
        ('[\n{"instruction": "a\n"}]', "Invalid control character at: line 2"),
        ('[\n{"instruction": "a", "n": ' + "1" * 5000 + "}]", "Exceeds the limit"),
        (
            '[\n{"instruction": "a", "n": 1, "instruction": "b", "output": "c"}]',
            "'instruction' is twice in one object; write it once: {",
        ),
        ("[\n" + "[" * 200_000, "recursion"),
    ],
    ids=range(9),
)
def test_a_broken_array_is_refused_even_when_skipping(text, reason, write, refused):
    path = write("rows.json", text)
    (message,) = refused(path, skip_bad=True)
    assert message.startswith(f"{path}: not valid JSON: ")
    assert reason in message


def test_bad_elements_of_an_array_are_named_by_index(write, refused):
    rows = b'[\n{"instruction": "a", "output": "b"},\n{"instruction": "a", "output": null},\n7,{"output": "\xff"}]'
    path = write("rows.json", rows)
    lines = refused(path)[1:]
    assert lines[0].startswith(f"{path}[1]: field 'output' is missing or null; there are 'instruction' (")
    assert lines[1:2] == [f"{path}[2]: expected an object, found 7"]
    assert lines[2].startswith(f"{path}[3]: field 'instruction' is missing")
    path = write("rows.json", b'[\n\n{"instruction": "\xff", "output": "b"}]')
    assert refused(path)[1].startswith(f"{path}[0]: instruction contains a lone surrogate or bytes that are not UTF-8")


def test_rows_of_an_array_have_their_index_and_the_ids_do_not(write, read):
    good = [{"instruction": f"a{i}", "output": "b"} for i in range(4)]
    one_line, lines = (read(write(name, good)).train for name in ("one.json", "lines.jsonl"))
    assert one_line.values("id") == lines.values("id")
    assert [place.rpartition("one.json")[2] for place in one_line.values("source")] == ["[0]", "[1]", "[2]", "[3]"]


# -------------------------------------------------------------------------------------------------- tables


def test_a_cell_that_cannot_be_read_is_named(tmp_path, refused, read):
    """The second row has a day of the year 2739877, which is no value of Python, in a column that no format reads."""
    texts, days = pa.array(["a", "b", "c"]), pa.array([1, 10**9, 2], pa.int32()).cast(pa.date32())
    table = pa.table({"instruction": texts, "output": texts, "extra": days})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    (line,) = refused(str(path))[1:]
    assert line.startswith(f"{path}[1]: column 'extra' cannot be read (OverflowError: ")
    assert read(str(path), skip_bad=True).train.values("source") == [f"{path}[0]", f"{path}[2]"]
    elsewhere = pa.array([1, 2, 3], pa.timestamp("us", "Mars/X"))
    pq.write_table(pa.table({"instruction": texts, "output": texts, "at": elsewhere}), path)
    (line, *_) = refused(str(path))[1:]
    assert line.startswith(f"{path}[0]: column 'at' cannot be read (")
    assert "Mars/X" in line
    pq.write_table(pa.Table.from_arrays([texts, texts, texts], ["instruction", "output", "output"]), path)
    assert refused(str(path)) == [f"{path}: the column 'output' is there twice; give each a name of its own"]
    rows = Source("someone/data", "fingerprint", datasets.Dataset(table)).rows()
    place, row = next(rows)
    assert (place, row["output"]) == ("someone/data[0]", "a")
    with pytest.raises(DataError, match=r"^someone/data: cannot be read behind its first 1 rows: "):
        next(rows)


MIXED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Yo"}]}]


def test_json_in_tables_comes_out_as_objects(tmp_path, read):
    """datasets stores values of several types as JSON, at any depth; so does DuckDB, without the words of datasets."""
    rows = [{"messages": MIXED, "meta": {"n": 1}}, {"messages": [*MIXED, *MIXED], "meta": {"n": "one"}}]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "arrow.json" in str(table.data.schema)
    table.to_parquet(tmp_path / "a.parquet")
    plain = pq.ParquetFile(tmp_path / "a.parquet").read().replace_schema_metadata(None)
    pq.write_table(plain, tmp_path / "b.parquet", store_schema=False)
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "saved" / "data-00000-of-00001.arrow"):
        assert [row for _, row in Source(path.name, "digest", path).rows()] == rows
        assert [turn.content for turn in next(read(str(path)).train.examples(whole=True)).messages] == ["Hi", "Yo"]


def test_a_key_that_is_there_twice_in_a_cell_of_a_table_is_a_bad_row(tmp_path, write, refused):
    """As in JSON lines: one of the values would be lost. The rows beside it are read."""
    good = [[("content", "Hi"), ("role", "user")], [("content", "Yo"), ("role", "assistant")]]
    twice = [good[0], [("content", "Yo"), ("role", "assistant"), ("content", "No")]]
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"messages": pa.array([good, twice, good], kind)}), tmp_path / "maps.parquet")
    right, wrong = json.dumps([dict(turn) for turn in good]), '[{"role": "user", "role": "assistant", "content": "Hi"}]'
    cells = pa.array([right, wrong, right]).cast(pa.json_())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), cells)
    for name, column in (("json.parquet", cells), ("lists.parquet", lists)):
        pq.write_table(pa.table({"messages": column}), tmp_path / name)
    features = datasets.Features(messages=datasets.Json())
    datasets.Dataset.from_dict({"messages": [right, wrong, right]}, features).save_to_disk(tmp_path / "saved")
    for path, key in (
        (tmp_path / "maps.parquet", "content"),
        (tmp_path / "json.parquet", "role"),
        (tmp_path / "lists.parquet", "role"),
        (tmp_path / "saved" / "data-00000-of-00001.arrow", "role"),
    ):
        rows = list(Source(path.name, "digest", path).rows())
        assert [isinstance(row, BadRow) for _, row in rows] == [False, True, False], path
        assert f"{key!r}" in str(rows[1][1])
    _, line = refused(str(tmp_path / "maps.parquet"))
    assert line.startswith(f"{tmp_path}/maps.parquet[1]: column 'messages' cannot be read (KeyError: ")


TURN = [("role", "user"), ("content", "Hi")], [("role", "assistant"), ("content", "Yo")]

COLUMNS = {
    "large": pa.array(["a"], pa.large_string()),
    "dictionary": pa.array(["a"]).dictionary_encode(),
    "view": pa.array(["a"], pa.string_view()),
    "decimal": pa.array([decimal.Decimal("1.5")]),
    "nanoseconds": pa.array([1], pa.timestamp("ns")),
    "zone": pa.array([1], pa.timestamp("us", "Europe/Berlin")),
    "duration": pa.array([1], pa.duration("us")),
    "binary": pa.array([b"\xff"]),
    "uuid": pa.array([b"\xff" * 16], pa.uuid()),
    "half": pa.array([1.5], pa.float16()),
    "nothing": pa.array([None]),
}


@pytest.mark.parametrize("turns", [pa.list_, pa.large_list], ids=["list", "large_list"])
def test_maps_are_objects_and_columns_of_any_type_stand_beside(turns, tmp_path, read):
    messages = pa.array([TURN], turns(pa.map_(pa.string(), pa.large_string())))
    pq.write_table(pa.table({"messages": messages, **COLUMNS}), tmp_path / "rows.parquet")
    (example,) = read(str(tmp_path / "rows.parquet")).train.examples(whole=True)
    assert [turn.content for turn in example.messages] == ["Hi", "Yo"]
    assert example.columns == {"large": "a", "dictionary": "a", "view": "a", "half": 1.5}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_object_over_several_lines_is_named_as_such(write, refused, name, mark):
    path = write(name, mark + json.dumps({"instruction": "a", "output": "b"}, indent=1))
    line = refused(path)[1]
    assert line.startswith(f"{path}:1: not valid JSON in UTF-8: ")
    assert line.endswith(
        "; a value over several lines is no JSON lines: write each row in one line, or an array in a .json file"
    )


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff \u2060\n", "\u200e\u00ad", "\ufe0f", "\u3164", "\u2800"])
def test_characters_that_show_nothing_alone_are_an_empty_text(write, read, refused, blank):
    rows = [{"instruction": "a", "output": blank}, {"instruction": "a", "input": blank, "output": "b\u200b"}]
    prepared = read(write("rows.jsonl", rows))
    assert prepared.report.counts == {"empty_response": 1}
    (example,) = prepared.train.examples(whole=True)
    assert [turn.content for turn in example.messages] == ["a", "b\u200b"]
    alone = write("input.jsonl", [{**rows[1], "instruction": blank, "input": "c"}])
    (example,) = read(alone).train.examples(whole=True)
    assert example.messages[0].content == "c", "as LLaMA-Factory joins them"
    assert "instruction and input are empty" in refused(write("bad.jsonl", [{"instruction": blank, "output": "b"}]))[1]


# ------------------------------------------------------------------------------------------------- hub ids


@pytest.mark.parametrize("name", ["no-such/set@train[:50%]", "no/set:main"])
def test_a_split_belongs_to_a_hub_id(name):
    assert datasets.config.HF_HUB_OFFLINE  # the tests reach no network
    with pytest.raises(DataError) as error:
        expand([name], "data.train")
    assert str(error.value).startswith(f"data.train: {name}: there is no such file, and as a Hugging Face hub id")


@pytest.mark.parametrize("name", ["no/such/file@train", "../missing@train", "missing.json", "folder/missing.jsonl"])
def test_a_path_that_is_missing_is_not_looked_up(name):
    with pytest.raises(DataError, match=r"no such file .*\(looked for /.*\); name a file"):
        expand([name], "data.train")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows@train.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert [source.data for source in expand(["rows@train.jsonl"], "data.train")[0]] == [Path("rows@train.jsonl")]


@pytest.mark.parametrize(("name", "asked"), [("a/b", (None, "train")), ("a/b:main@test", ("main", "test"))])
def test_a_subset_and_a_split_are_what_datasets_is_asked_for(name, asked, monkeypatch):
    table = datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])
    seen = []

    def load(*args, **more):
        seen.append((*args, more))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    (source,) = expand([name], "data.train")[0]
    assert seen == [("a/b", asked[0], {"split": asked[1]})]
    assert list(source.rows()) == [(f"{name}[0]", table[0])]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://example.org/a.jsonl", "is a URL; name a place on this machine, or a hub id"),
        ("rows/*.jsonl", r"is a pattern, and only names are read: name the directory, or each file, '\[a"),
        ("rows[12].json", "is a pattern"),
    ],
)
def test_what_is_no_name_of_a_file_is_said(name, words, read):
    with pytest.raises(DataError, match=rf"^data\.train: {re.escape(name)} {words}"):
        read(name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize(
    "content", [gzip.compress(b'{"prompt": "p"}', mtime=0), b"PAR1\x15\x04\x15\0", bytes(range(256))]
)
def test_binary_files_are_named_as_such(name, content, write, read):
    path = write(name, content)
    with pytest.raises(DataError, match=rf"^{path}: binary, and no text; files ending in \{Path(name).suffix} are"):
        read(path)


def test_an_arrow_file_that_is_no_stream_is_named_as_such(tmp_path, read):
    table, path = pa.table({"prompt": ["p"], "completion": ["c"]}), tmp_path / "rows.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"rows\.arrow: an Arrow IPC file, .* or by pyarrow\.ipc\.new_stream$"):
        read(str(path))
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    assert len(read(str(path)).train.records) == 1


# ----------------------------------------------------------------------------------------------- text files


def texts_of(prepared) -> list[str]:
    return [document.messages[0].content for document in prepared.train.read()]


def test_text_files_are_documents(write, read):
    crlf = write("a.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo caf\xc3\xa9s.\r\n")
    prepared = read(crlf, write("b.txt", "Three.\n"), write("c.txt", " \n\n"))
    assert texts_of(prepared) == ["One.\n\nTwo cafés.\n", "Three.\n"]
    assert (prepared.report.counts, prepared.report.rows) == ({"empty_document": 1}, 3)


@pytest.mark.parametrize("first", ['{"text": "a', "42", '{"body": "b"}'], ids=["broken", "number", "unknown"])
def test_a_bad_row_does_not_say_what_the_others_are(first, write, read, refused):
    path = write("rows.jsonl", "\n".join([first, '{"text": "One tale."}', '{"text": "Two tales."}']))
    prepared = read(path, skip_bad=True, format="text")
    assert texts_of(prepared) == ["One tale.", "Two tales."]
    assert prepared.report.counts == {"bad_row": 1}
    assert refused(path, format="text")[1].startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x" * 70_000 + b"\n\n\xc3", ": text contains a lone surrogate or bytes that are not UTF-8"),
        ("a.txt", b"one\ntwo\0\n", r": text contains a NUL"),
        ("a.jsonl", [{"instruction": "a", "output": "b"}, {"text": "c"}], r":2: format not recognised from the fields"),
    ],
)
def test_bad_documents_are_named(name, content, message, write, refused):
    path = write(name, content)
    assert refused(path)[1].startswith(path + message)


def test_a_text_file_has_a_limit(monkeypatch, write, refused):
    monkeypatch.setattr("sftmix.data.row_files.MAX_TEXT_BYTES", 10)
    path = write("a.txt", "x" * 11)
    assert refused(path)[1] == f"{path}: a document of 11 bytes; the limit is 10: cut it into several"


def test_text_files_beside_rows_are_notes_about_them(write, read, tmp_path):
    write("README.txt", "About these rows.\n")
    assert len(read(str(tmp_path)).train.records) == 1
    write("rows.jsonl", [{"text": "a tale", "prompt": "p", "completion": "c"}])
    assert read(str(tmp_path)).options.format == "auto"
    assert len(read(str(tmp_path), format="text").train.records) == 2


ROW = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (
            "tail.jsonl",
            f"{ROW}\n" + "\0" * 40 + "\n",
            ":2: not valid JSON in UTF-8: it has NUL bytes, as a crash leaves ",
        ),
        ("wide.jsonl", ROW.encode("utf-32-be"), ":1: not valid JSON in UTF-8: it is in UTF-32-BE; save it as UTF-8"),
        (
            "array.jsonl",
            f"[{ROW}, {ROW}]\n",
            ":1: a list, and a line is one row; a file with one array of rows ends in .j",
        ),
        (
            "object.json",
            f'{{"version": 1, "data": [{ROW}]}}',
            "if the rows are those of 'data', write that list alone, [...]",
        ),
        (
            "split.json",
            f'{{"train": [{ROW}], "test": []}}',
            "if the rows are those of 'train', write that list alone, [...",
        ),
    ],
)
def test_a_problem_is_said_with_the_right_remedy(write, refused, name, text, reason):
    assert reason in refused(write(name, text))[1]


def test_a_pipe_is_no_empty_file(tmp_path, refused):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert refused(str(tmp_path / "rows.jsonl"))[0].endswith(
        "rows.jsonl: no regular file, but a pipe or a device; write the rows into a file"
    )


@pytest.mark.parametrize("option", [{"label_field": "kind"}, {"columns": {"id": "kind"}}])
def test_a_field_that_first_comes_behind_the_limit_is_missed_in_the_rows_that_were_read(write, refused, option):
    rows = [{"instruction": f"q{i}", "output": "a", **({"kind": "k"} if i == 9 else {})} for i in range(12)]
    path = write("rows.jsonl", rows)
    (line,) = refused(path, limit=3, **option)
    assert "none of the first 4 rows, all that data.limit reads, of data.train has the field 'kind' (for" in line
    other = {key: "knd" if key == "label_field" else {"id": "knd"} for key in option}
    assert ": no row of data.train has the field 'knd' (for" in refused(path, limit=20, **other)[0]
