"""Rows with field names of their own (data.columns)."""

import json

import pytest

from sftmix.common.errors import ConfigError

ROWS = [{"question": f"Say {i}.", "answer": f"{i}!", "kind": "odd" if i % 2 else "even"} for i in range(8)]
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
COLUMNS = {"prompt": "question", "response": "answer"}


def turns(side) -> list[list[str]]:
    return [[m.content for m in e.messages] for e in side.examples(whole=True)]


def test_rows_are_those_that_were_renamed_by_hand(write, read):
    """They have the same ids; the other fields keep their names, and a label may be named as in the rows."""
    by_hand = [{"prompt": r["question"], "completion": r["answer"], "kind": r["kind"]} for r in ROWS]
    expected = read(write("hand.jsonl", by_hand)).train
    path = write("rows.json", ROWS)
    train = read(path, columns=COLUMNS).train
    assert turns(train) == turns(expected) == [[r["question"], r["answer"]] for r in ROWS]
    assert train.values("id") == expected.values("id")
    assert list(map(json.loads, train.values("columns"))) == [{"kind": r["kind"]} for r in ROWS]
    for field, label in (("kind", "even"), ("answer", "0!")):
        assert read(path, columns=COLUMNS, label_field=field).train.values("label")[0] == label


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"messages": "dialog"}, {"dialog": TURNS}, "u|a"),
        ({"conversations": "turns"}, {"turns": TURNS}, "u|a"),
        ({"instruction": "q", "input": "context", "output": "r"}, {"q": "u", "context": "c", "r": "a"}, "u\nc|a"),
        ({"instruction": "q", "output": "r", "history": "h"}, {"q": "u", "r": "a", "h": [["v", "b"]]}, "v|b|u|a"),
        ({"instruction": "input", "input": "instruction"}, {"input": "u", "instruction": "c", "output": "a"}, "u\nc|a"),
        ({"prompt": "question", "id": "key"}, {"question": "u", "completion": "a", "key": "k"}, "u|a"),
        ({"prompt": "question"}, {"prompt": "a template", "question": "u", "completion": "a"}, "u|a"),
        ({**COLUMNS, "system": "rules"}, {"question": "u", "answer": "a", "rules": "Be short."}, "Be short.|u|a"),
        # The rows also have the fields of another format, which comes first without data.columns.
        ({"prompt": "q", "response": "r"}, {"q": "u", "r": "a", "instruction": "x", "output": "y"}, "u|a"),
        ({"text": "body"}, {"body": "One.", "text": "no", "prompt": "no"}, "One."),
    ],
)
def test_fields_of_each_format(columns, row, expected, write, read):
    train = read(write("rows.jsonl", [row]), columns=columns).train
    assert ["|".join(contents) for contents in turns(train)] == [expected]
    assert "key" not in row or train.values("id") == ["k"]


def test_files_with_our_names_go_beside_them(write, read):
    """One of several training files, or the held-out rows."""
    own = write("own.jsonl", [{"instruction": "u", "output": "a"}])
    held_out = write("held.jsonl", [{"prompt": "v", "completion": "b"}])
    prepared = read(write("rows.jsonl", ROWS), own, eval=[held_out], columns=COLUMNS)
    assert turns(prepared.train)[-1] == ["u", "a"]
    assert turns(prepared.eval) == [["v", "b"]]


def test_columns_are_part_of_the_identity(write, read):
    path = write("rows.jsonl", [{**row, "other": "no"} for row in ROWS])
    found = [read(path, columns={"prompt": "question", "response": name}).train for name in ("answer", "other")]
    assert turns(found[1])[0] == ["Say 0.", "no"]
    assert len({side.fingerprint for side in found} | {side.cache_key for side in found}) == 4


@pytest.mark.parametrize(
    ("columns", "form", "message"),
    [
        ({"prmpt": "question", "response": "answer"}, "auto", "no format of data.format auto has prmpt and response; "),
        (COLUMNS, "alpaca", "no format of data.format alpaca has prompt and response; .*instruction"),
        ({"completion": "answer", "response": "answer"}, "auto", "the same field"),
    ],
)
def test_left_names_that_no_format_has(columns, form, message, write, read):
    with pytest.raises(ConfigError, match=rf"^data\.columns.*{message}"):
        read(write("rows.jsonl", ROWS), columns=columns, format=form)


def test_a_column_that_no_row_has_is_named_with_the_fields_that_are_there(write, refused):
    columns = {"prompt": "qestion", "response": "answer"}
    assert refused(write("rows.jsonl", ROWS), columns=columns) == [
        "data.columns: no row of data.train has the field 'qestion' (for prompt). Did you mean question? "
        "The fields there are 'question', 'answer', 'kind'."
    ]


def test_a_column_that_no_held_out_row_has(write, refused):
    """Nor its own field of that name."""
    held_out = write("held.jsonl", [{"question": "u", "reply": "a"}])
    (line,) = refused(write("rows.jsonl", ROWS), eval=[held_out], columns=COLUMNS)
    assert "no row of data.eval has the field 'answer' (for completion)" in line
