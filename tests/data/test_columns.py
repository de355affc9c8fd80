"""Rows with field names of their own (data.columns), through the command line and through prepare."""

from __future__ import annotations

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.common.errors import ConfigError, DataError
from sftmix.data.rows import prepare
from tests.tiny import Tiny, make_tiny

ROWS = [{"question": f"Say {i}.", "answer": f"{i}!", "kind": "odd" if i % 2 else "even"} for i in range(8)]
NAMES = "{prompt: question, response: answer}"
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
COLUMNS = {"prompt": "question", "response": "answer"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def write_as(suffix: str, write, tmp_path) -> str:
    if suffix == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        return write("rows.csv", text.getvalue())
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")
    return write(f"rows.{suffix}", ROWS)


def turns(side) -> list[list[str]]:
    return [[m.content for m in e.messages] for _, _, e in side.examples(side.records, whole=True)]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_the_rows_of_every_kind_of_file_are_those_of_renamed_rows(suffix, write, options, tmp_path):
    """Renamed by hand, they have the same ids; the other fields keep their names."""
    by_hand = [{"prompt": r["question"], "completion": r["answer"], "kind": r["kind"]} for r in ROWS]
    expected = prepare(options(write("hand.jsonl", by_hand)), 0, progress=False).train
    found = prepare(options(write_as(suffix, write, tmp_path), columns=COLUMNS), 0, progress=False).train
    assert turns(found) == turns(expected) == [[r["question"], r["answer"]] for r in ROWS]
    assert [found.id(r) for r in range(8)] == [expected.id(r) for r in range(8)]
    assert [found.columns(r) for r in range(8)] == [{"kind": r["kind"]} for r in ROWS]


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"messages": "dialog"}, {"dialog": TURNS}, "u"),
        ({"conversations": "turns"}, {"turns": TURNS}, "u"),
        ({"instruction": "q", "input": "context", "output": "r"}, {"q": "u", "context": "c", "r": "a"}, "u\nc"),
        ({"instruction": "q", "output": "r", "history": "h"}, {"q": "u", "r": "a", "h": []}, "u"),
        ({"instruction": "input", "input": "instruction"}, {"input": "u", "instruction": "c", "output": "a"}, "u\nc"),
        ({"prompt": "question", "id": "key"}, {"question": "u", "completion": "a", "key": "k"}, "u"),
        ({"prompt": "question"}, {"prompt": "a template", "question": "u", "completion": "a"}, "u"),
        # The rows also have the fields of another format, which comes first without data.columns.
        ({"prompt": "q", "response": "r"}, {"q": "u", "r": "a", "instruction": "x", "output": "y"}, "u"),
    ],
)
def test_fields_of_each_format(columns, row, expected, write, options):
    train = prepare(options(write("rows.jsonl", [row]), columns=columns), 0, progress=False).train
    assert turns(train) == [[expected, "a"]]
    assert "key" not in row or train.id(0) == "k"


def test_documents_and_the_system_turn(write, options):
    path = write("rows.jsonl", [{"body": "One.", "text": "no", "prompt": "no"}, {"body": "Two."}])
    prepared = prepare(options(path, columns={"text": "body"}), 0, progress=False)
    assert ["".join(prepared.train.text(r)) for r in (0, 1)] == ["One.", "Two."]
    path = write("more.jsonl", [{**ROWS[0], "rules": "Be short."}])
    train = prepare(options(path, columns={**COLUMNS, "system": "rules"}), 0, progress=False).train
    assert turns(train) == [["Be short.", "Say 0.", "0!"]]


def test_a_label_may_be_named_as_in_the_rows(write, options):
    """Also where that field is the response, too."""
    for field, label in (("kind", "even"), ("answer", "0!")):
        given = options(write("rows.jsonl", ROWS), columns=COLUMNS, label_field=field)
        assert prepare(given, 0, progress=False).train.label(0) == label


def test_files_with_our_names_go_beside_them(write, options):
    """One of several training files, or the held-out rows."""
    own = write("own.jsonl", [{"instruction": "u", "output": "a"}])
    held_out = write("held.jsonl", [{"prompt": "v", "completion": "b"}])
    given = options(write("rows.jsonl", ROWS), own, eval=[held_out], columns=COLUMNS)
    prepared = prepare(given, 0, progress=False)
    assert turns(prepared.train)[-1] == ["u", "a"]
    assert turns(prepared.eval) == [["v", "b"]]


def test_columns_are_part_of_the_identity(write, options):
    path = write("rows.jsonl", [{**row, "other": "no"} for row in ROWS])
    found = [
        prepare(options(path, columns={"prompt": "question", "response": name}), 0, progress=False).train
        for name in ("answer", "other")
    ]
    assert turns(found[1])[0] == ["Say 0.", "no"]
    assert len({side.fingerprint for side in found} | {side.cache_key for side in found}) == 4


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prmpt": "question", "response": "answer"}, "no format of data.format auto has prmpt and response; "),
        ({"instruction": "question", "response": "answer"}, "no format of data.format auto has instruction and "),
        ({"completion": "answer", "response": "answer"}, "the same field"),
    ],
)
def test_left_names_that_no_format_has(columns, message, write, options):
    with pytest.raises(ConfigError, match=rf"^data\.columns.*{message}"):
        prepare(options(write("rows.jsonl", ROWS), columns=columns), 0, progress=False)


def test_left_names_that_the_named_format_lacks(write, options):
    given = options(write("rows.jsonl", ROWS), columns=COLUMNS, format="alpaca")
    with pytest.raises(ConfigError, match=r"no format of data\.format alpaca has prompt and response; .*instruction"):
        prepare(given, 0, progress=False)


def test_a_column_that_no_row_has_is_named_with_the_fields_that_are_there(tiny, write, sftmix, tmp_path):
    words = ["--model.path", str(tiny.model), "--data.train", write("rows.jsonl", ROWS)]
    for command in (["preview"], ["run", "--out", str(tmp_path / "run")]):
        found = sftmix(*command, *words, "--data.columns", "{prompt: qestion, response: answer}")
        assert found.code == 3
        assert (
            "data.columns: no row of data.train has the field 'qestion' (for prompt). Did you mean question? "
            "The fields there are 'question', 'answer', 'kind'."
        ) in found.err


def test_a_column_that_no_held_out_row_has(write, options):
    """Nor its own field of that name."""
    held_out = write("held.jsonl", [{"question": "u", "reply": "a"}])
    with pytest.raises(DataError, match=r"no row of data\.eval has the field 'answer' \(for response\)"):
        prepare(options(write("rows.jsonl", ROWS), eval=[held_out], columns=COLUMNS), 0, progress=False)


def test_bad_rows_say_how_they_were_read(write, options):
    path = write("rows.jsonl", [*ROWS, {"question": "u", "answer": None}])
    with pytest.raises(DataError) as caught:
        prepare(options(path, columns=COLUMNS), 0, progress=False)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        f"{path}:9: completion must be a string, found null",
        "data.columns: prompt is read from 'question', completion (response) is read from 'answer'",
    ]
