"""Each row format gives the conversation that it means; ids, labels and columns are as documented."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.data.formats import FORMATS, convert, recognise
from sftmix.data.jsonrows import BadRow
from sftmix.types import Example, Message
from tests.data.test_rows import dialogues

U, A = (lambda text: Message("user", text)), (lambda text: Message("assistant", text, True))

A_TURN = {"role": "assistant", "content": "a"}
CASES = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": " 3\n"}, [U("Add.\n1 2"), A(" 3\n")]),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
            ]
        },
        [Message("system", "S"), U("u"), A("a")],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "u"},
                {"role": "assistant", "content": "a"},
            ]
        },
        [U("u"), A("a")],
    ),
    "prompt_completion": (
        {
            "prompt": [{"role": "user", "content": "u"}, A_TURN, {"role": "user", "content": "v"}],
            "completion": [A_TURN],
        },
        [U("u"), Message("assistant", "a"), U("v"), A("a")],
    ),
    "history": (
        {"instruction": "u1", "input": "", "output": "a1", "history": [["u0", "a0"]]},
        [U("u0"), A("a0"), U("u1"), A("a1")],
    ),
    "text": ({"text": "a tale", "id": "x"}, [Message("text", "a tale", True)]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_recognised_and_converted(name):
    row, expected = CASES[name]
    assert recognise(row) == name
    assert convert(row, name).messages == tuple(expected)


@pytest.mark.parametrize("extra", ["", "  ", None])
def test_alpaca_without_input_is_the_instruction(extra):
    row = {"instruction": "Say hi.", "output": "Hi"} | ({} if extra is None else {"input": extra})
    assert convert(row, "alpaca").messages[0] == U("Say hi.")


def test_a_turn_of_weight_0_is_not_trained():
    pairs = [("user", {}), ("assistant", {"weight": 0}), ("user", {}), ("assistant", {"weight": 1})]
    row = {"messages": [{"role": role, "content": f"t{i}"} | more for i, (role, more) in enumerate(pairs)]}
    assert [m.trained for m in convert(row, "messages").messages] == [False, False, False, True]
    row["messages"][1]["weight"] = None  # as in tables, where other rows have a weight
    assert [m.trained for m in convert(row, "messages").messages] == [False, True, False, True]


def test_label_columns_and_id():
    row = {"id": 5, "instruction": "a", "output": "b", "good": True, "score": 1.5, "tags": ["x"], "note": None}
    found = convert(row, "alpaca", label_field="good")
    assert (found.id, found.label, found.columns) == ("5", "true", {"score": 1.5, "note": None})
    with pytest.raises(BadRow, match="field 'quality' is missing"):
        convert(row, "alpaca", label_field="quality")


def conversations(prepared, *, whole: bool = True) -> list[Example]:
    return list(prepared.train.examples(whole=whole))


def all_messages(prepared):
    return [example.messages for example in conversations(prepared)]


def test_the_same_rows_from_every_kind_of_file(write, read, tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "" if i % 2 else 'x, "y"\nz', "output": f"{i}é"} for i in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    text = "instruction,input,output\n" + "".join(
        ",".join('"' + row[k].replace('"', '""') + '"' for k in ("instruction", "input", "output")) + "\n"
        for row in rows
    )
    paths = [write("a.json", rows), write("b.jsonl", rows), write("c.csv", text), str(tmp_path / "d.parquet")]
    lines = write("lines.json", "".join(json.dumps(row) + "\n" for row in rows))  # JSONL under the name .json
    expected = all_messages(read(paths[1]))
    assert len(expected) == 7
    for path in (*paths, lines):
        assert all_messages(read(path)) == expected
    folder = read(str(tmp_path))  # five files, sorted
    assert all_messages(folder) == expected * 5
    sources = folder.train.values("source")
    assert sources[7].endswith("/b.jsonl:1")
    assert sources[21 + 3].endswith("/d.parquet[3]")
    assert folder.report.counts["duplicate"] == 28


def test_every_row_is_recognised_by_itself_and_a_named_format_is_kept(write, read, refused):
    rows = [
        {"instruction": "u", "output": "a"},
        {"instruction": "w", "output": "b", "history": [["u", "a"]]},
        {"prompt": "u", "completion": "a"},
    ]
    path = write("mixed.jsonl", rows)
    prepared = read(path)
    contents = [[m.content for m in messages] for messages in all_messages(prepared)]
    assert contents == [["u", "a"], ["u", "a", "w", "b"], ["u", "a"]]
    ids = prepared.train.values("id")
    assert ids[2] == ids[0] + "#1"  # the same content
    assert refused(path, format="alpaca")[1] == f"{path}:3: field 'instruction' is missing"
    bad = write("bad.jsonl", [rows[0], {"instruction": "w"}])
    assert refused(bad)[1] == f"{bad}:2: field 'output' is missing"


def test_each_turn_is_an_example_with_its_history(write, read):
    """Turn numbers do not count a system message; turns without text are skipped."""
    turns = ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user"]
    row = {"messages": [{"role": r, "content": "" if i == 4 else f"t{i}"} for i, r in enumerate(turns)], "id": "c"}
    prepared = read(write("rows.jsonl", [row, *dialogues(1)]))
    assert prepared.report.counts == {"empty_response": 1}

    def found(whole: bool) -> list:
        chats = conversations(prepared, whole=whole)
        return [(e.id, len(e.messages), [i for i, m in enumerate(e.messages) if m.trained]) for e in chats]

    assert found(False) == [("c@turn0", 3, [2]), ("c@turn2", 7, [6]), ("c0", 2, [1])]
    assert found(True) == [("c", 7, [2, 6]), ("c0", 2, [1])]


@pytest.mark.parametrize("name", ["alpaca", "prompt_completion", "history"])
def test_a_system_field_is_the_first_turn(name):
    row, expected = CASES[name]
    found = convert({**row, "system": "S"}, name)
    assert found.messages == (Message("system", "S"), *expected)
    assert "system" not in found.columns
    assert convert({**row, "system": None}, name).messages == tuple(expected)


def test_a_system_field_and_a_system_turn_are_one_too_many():
    with pytest.raises(BadRow, match="both a system field and a system turn"):
        convert({**CASES["messages"][0], "system": "T"}, "messages")


def test_parts_of_type_text_are_one_text():
    """In tables each part has all the fields of the others."""
    split = [["one", " two"], ["three\n", "\nfour", ""]]
    contents = [[{"type": "text", "text": text, "image_url": None} for text in texts] for texts in split]
    row = {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), contents, strict=True)]}
    assert convert(row, "messages").messages == (U("one two"), A("three\n\nfour"))
