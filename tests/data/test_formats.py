"""Each row format gives the conversation that it means; ids, labels and columns are as documented."""

from __future__ import annotations

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


def test_each_file_has_its_own_format_and_a_named_format_is_kept(write, read, refused):
    first = write("a.jsonl", [{"instruction": "a", "output": "b"}])
    second = write("b.jsonl", [{"prompt": "a", "completion": "b"}])
    ids = read(first, second).train.values("id")
    assert ids[1] == ids[0] + "#1"  # the same content
    assert refused(first, second, format="alpaca")[1] == f"{second}:1: field 'instruction' is missing"


def test_each_turn_is_an_example_with_its_history(write, read):
    prepared = read(write("rows.jsonl", dialogues(3)))
    turns = conversations(prepared, whole=False)
    assert [e.id for e in turns] == ["c0", "c1@turn0", "c1@turn1", "c2@turn0", "c2@turn1", "c2@turn2"]
    last = turns[-1].messages
    assert [m.content for m in last] == ["user20", "assistant20", "user21", "assistant21", "user22", "assistant22"]
    assert [m.trained for m in last] == [False] * 5 + [True]
    whole = conversations(prepared)
    assert [e.id for e in whole] == ["c0", "c1", "c2"]
    assert [m.trained for m in whole[2].messages] == [False, True] * 3


def test_turn_numbers_do_not_count_a_system_message_and_skip_empty_turns(write, read):
    turns = ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user"]
    row = {"messages": [{"role": r, "content": "" if i == 4 else f"t{i}"} for i, r in enumerate(turns)]}
    prepared = read(write("rows.jsonl", [row]))
    assert [e.id.split("@")[1] for e in conversations(prepared, whole=False)] == ["turn0", "turn2"]
    assert prepared.report.counts == {"empty_response": 1}
    (whole,) = conversations(prepared)
    assert [m.trained for m in whole.messages] == [False, False, True, False, False, False, True]


def test_a_system_field_is_the_first_turn_in_every_format():
    rows = [
        ({"instruction": "u", "output": "a", "system": "S"}, "alpaca"),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "S"},
            "sharegpt",
        ),
        ({"prompt": "u", "completion": "a", "system": "S"}, "prompt_completion"),
    ]
    for row, name in rows:
        assert convert(row, name).messages == (Message("system", "S"), U("u"), A("a"))
        assert convert({**row, "system": None}, name).messages == (U("u"), A("a"))
        assert "system" not in convert(row, name).columns
    both = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}], "system": "T"}
    with pytest.raises(BadRow, match="both a system field and a system turn"):
        convert(both, "messages")


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def test_parts_of_type_text_are_one_text(write, read, tmp_path):
    """With the id of the same row with strings; in tables each part has all the fields of the others."""
    turns = [("system", "S"), ("user", "one two"), ("assistant", "three\n\nfour")]
    split = [parts("S"), parts("one", " two"), parts("three\n", "\nfour", "")]
    row = {"messages": [{"role": r, "content": c} for (r, _), c in zip(turns, split, strict=True)]}
    row["messages"][0]["content"][0]["image_url"] = None
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (joined,) = conversations(read(str(tmp_path / "rows.parquet")))
    strings = write("strings.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    assert [(m.role, m.content) for m in joined.messages] == turns
    assert joined.id == conversations(read(strings))[0].id


def test_every_row_of_a_file_is_recognised_by_itself(write, read, refused):
    rows = [
        {"instruction": "u", "output": "a"},
        {"instruction": "w", "output": "b", "history": [["u", "a"]]},
        {"prompt": "u", "completion": "c"},
    ]
    turns = [[m.content for m in messages] for messages in all_messages(read(write("mixed.jsonl", rows)))]
    assert turns == [["u", "a"], ["u", "a", "w", "b"], ["u", "c"]]
    bad = write("bad.jsonl", [rows[0], {"instruction": "w"}])
    assert refused(bad)[1] == f"{bad}:2: field 'output' is missing"
