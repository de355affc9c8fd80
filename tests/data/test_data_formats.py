"""Each row format gives the conversation that it means; ids, labels, columns and sides are as documented."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.common.errors import ConfigError, DataError
from sftmix.data.formats import FORMATS, convert, recognise
from sftmix.data.jsonrows import BadRow
from sftmix.data.rows import prepare
from sftmix.types import Message

U, A = (lambda text: Message("user", text)), (lambda text: Message("assistant", text, True))

CASES = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": " 3\n"}, [U("Add.\n1 2"), A(" 3\n")]),
    "messages": (
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]},
        None,
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [U("u"), A("a")],
    ),
    "prompt_completion": ({"prompt": "u", "completion": "a"}, [U("u"), A("a")]),
    "history": (
        {"instruction": "u1", "input": "", "output": "a1", "history": [["u0", "a0"]]},
        [U("u0"), A("a0"), U("u1"), A("a1")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_recognised_and_converted(name):
    row, expected = CASES[name]
    if name == "messages":
        row["messages"].append({"role": "assistant", "content": "a"})
        expected = [Message("system", "S"), U("u"), A("a")]
    assert recognise(row) == name
    assert convert(row, name).messages == tuple(expected)


@pytest.mark.parametrize("extra", ["", "  ", None])
def test_alpaca_without_input_is_the_instruction(extra):
    row = {"instruction": "Say hi.", "output": "Hi"} | ({} if extra is None else {"input": extra})
    assert convert(row, "alpaca").messages[0] == U("Say hi.")


def test_turns_of_the_prompt_are_not_trained():
    chat = [{"role": r, "content": c} for r, c in (("user", "u0"), ("assistant", "a0"), ("user", "u1"))]
    found = convert({"prompt": chat, "completion": [{"role": "assistant", "content": "a1"}]}, "prompt_completion")
    assert [m.trained for m in found.messages] == [False, False, False, True]


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
    with pytest.raises(BadRow, match=r"'quality' \(data\.label_field\) is missing"):
        convert(row, "alpaca", label_field="quality")


def _all_messages(prepared):
    return [prepared.train.example(r).messages for r in prepared.train.records.tolist()]


def test_the_same_rows_from_every_kind_of_file(write, options, tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "" if i % 2 else 'x, "y"\nz', "output": f"{i}é"} for i in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    text = "instruction,input,output\n" + "".join(
        ",".join('"' + row[k].replace('"', '""') + '"' for k in ("instruction", "input", "output")) + "\n"
        for row in rows
    )
    paths = [write("a.json", rows), write("b.jsonl", rows), write("c.csv", text), str(tmp_path / "d.parquet")]
    lines = write("lines.json", "".join(json.dumps(row) + "\n" for row in rows))  # JSONL under the name .json
    expected = _all_messages(prepare(options(paths[1]), 0, progress=False))
    assert len(expected) == 7
    for path in (*paths, lines):
        assert _all_messages(prepare(options(path), 0, progress=False)) == expected
    folder = prepare(options(str(tmp_path)), 0, progress=False)  # five files, sorted
    assert _all_messages(folder) == expected * 5
    assert folder.train.source(7).endswith("/b.jsonl:1")
    assert folder.train.source(21 + 3).endswith("/d.parquet[3]")
    assert folder.report.counts["duplicate"] == 28


def test_each_file_has_its_own_format_and_a_named_format_is_kept(write, options):
    first = write("a.jsonl", [{"instruction": "a", "output": "b"}])
    second = write("b.jsonl", [{"prompt": "a", "completion": "b"}])
    prepared = prepare(options(first, second), 0, progress=False)
    assert prepared.train.id(1) == prepared.train.id(0) + "#1"  # the same content
    with pytest.raises(DataError, match=r"b\.jsonl:1: field 'instruction' is missing"):
        prepare(options(first, second, format="alpaca"), 0, progress=False)


# --------------------------------------------------------------------------------------- ids and sides


def _dialogues(n):
    return [
        {
            "id": f"c{i}",
            "messages": [{"role": r, "content": f"{r}{i}{t}"} for t in range(1 + i % 3) for r in ("user", "assistant")],
        }
        for i in range(n)
    ]


def test_each_turn_is_an_example_with_its_history(write, options):
    prepared = prepare(options(write("rows.jsonl", _dialogues(3))), 0, progress=False)
    found = list(prepared.train.examples(prepared.train.records, whole=False))
    assert [e.id for _, _, e in found] == ["c0", "c1@turn0", "c1@turn1", "c2@turn0", "c2@turn1", "c2@turn2"]
    last = found[-1][2].messages
    assert [m.content for m in last] == ["user20", "assistant20", "user21", "assistant21", "user22", "assistant22"]
    assert [m.trained for m in last] == [False] * 5 + [True]
    whole = [e for _, _, e in prepared.train.examples(prepared.train.records, whole=True)]
    assert [e.id for e in whole] == ["c0", "c1", "c2"]
    assert [m.trained for m in whole[2].messages] == [False, True] * 3


def test_turn_numbers_do_not_count_a_system_message_and_skip_empty_turns(write, options):
    turns = ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user"]
    row = {"messages": [{"role": r, "content": "" if i == 4 else f"t{i}"} for i, r in enumerate(turns)]}
    prepared = prepare(options(write("rows.jsonl", [row])), 0, progress=False)
    found = [e for _, _, e in prepared.train.examples(prepared.train.records, whole=False)]
    assert [e.id.split("@")[1] for e in found] == ["turn0", "turn2"]
    assert prepared.report.counts == {"empty_response": 1}
    (whole,) = (e for _, _, e in prepared.train.examples(prepared.train.records, whole=True))
    assert [m.trained for m in whole.messages] == [False, False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"eval": ["x.jsonl"], "eval_fraction": 0.1},
            r"data\.eval \(x\.jsonl\) and data\.eval_fraction \(0\.1\) exclude",
        ),
        ({"eval_fraction": 1.0}, r"data\.eval_fraction is 1\.0; allowed: in \(0, 1\)"),
        ({"eval_fraction": 0.99}, r"data\.eval_fraction = 0\.99 of 3 rows leaves no training row"),
        ({"eval": []}, r"data\.eval is an empty list"),
        ({"limit": 0}, r"data\.limit is 0; allowed: at least 1"),
    ],
)
def test_options_that_cannot_be(more, message, write, options):
    path = write("rows.jsonl", _dialogues(3))
    with pytest.raises(ConfigError, match=message):
        prepare(options(path, **more), 0, progress=False)
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        prepare(options(), 0, progress=False)


@pytest.mark.parametrize("name", ["alpaca/alpaca_8k.json", "alpaca/alpaca_17k.jsonl", "medical/medquad_4k.jsonl"])
def test_real_files_hold_no_bad_row(name, shared, options):
    report = prepare(options(str(shared / "data" / name)), 0, progress=False).report
    assert report.rows > 3000
    assert "bad_row" not in report.counts


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


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_parts_of_type_text_are_one_text(suffix, write, options, tmp_path):
    """With the id of the same row with strings."""
    turns = [("system", "S"), ("user", "one two"), ("assistant", "three\n\nfour")]
    split = [parts("S"), parts("one", " two"), parts("three\n", "\nfour", "")]
    rows = [{"messages": [{"role": r, "content": c} for (r, _), c in zip(turns, split, strict=True)]}]
    if suffix == "parquet":  # where each part has all the fields of the others
        rows[0]["messages"][0]["content"][0]["image_url"] = None
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet") if suffix == "parquet" else write("rows.jsonl", rows)
    found = prepare(options(path), 0, progress=False).train
    strings = write("strings.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    expected = prepare(options(strings), 0, progress=False).train
    assert [(m.role, m.content) for m in found.example(0).messages] == turns
    assert found.id(0) == expected.id(0)


def test_every_row_of_a_file_is_recognised_by_itself(write, options):
    rows = [
        {"instruction": "u", "output": "a"},
        {"instruction": "w", "output": "b", "history": [["u", "a"]]},
        {"prompt": "u", "completion": "c"},
    ]
    found = prepare(options(write("mixed.jsonl", rows)), 0, progress=False).train
    turns = [[m.content for m in e.messages] for _, _, e in found.examples(np.arange(3), whole=True)]
    assert turns == [["u", "a"], ["u", "a", "w", "b"], ["u", "c"]]
    with pytest.raises(DataError, match=r"bad.jsonl:2: field 'output' is missing"):
        prepare(options(write("bad.jsonl", [rows[0], {"instruction": "w"}])), 0, progress=False)


def test_each_file_has_its_label(write, options, tmp_path):
    rows = _dialogues(6)
    (tmp_path / "many").mkdir()
    write("many/a.jsonl", rows[:2])
    write("many/b.jsonl", rows[2:3])
    high, many = write("high.jsonl", rows[3:]), str(tmp_path / "many")
    held_out = write("held.jsonl", _dialogues(9)[7:])
    given = options(many, high, eval=[held_out], labels=["low", "high"])
    prepared = prepare(given, 0, progress=False)
    found = [prepared.train.label(r) for r in prepared.train.records.tolist()]
    assert found == ["low"] * 3 + ["high"] * 3
    assert {prepared.eval.label(r) for r in prepared.eval.records.tolist()} == {None}
    again = [
        prepare(options(many, high, **more), 0, progress=False).train
        for more in ({"labels": ["low", "high"]}, {"labels": ["low", "low"]}, {})
    ]
    assert again[0].fingerprint == prepared.train.fingerprint
    assert len({side.fingerprint for side in again}) == len({side.cache_key for side in again}) == 3
    assert [again[1].label(0), again[2].label(0)] == ["low", None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"labels": ["high"], "label_field": "q"}, r"data\.labels \(high\) and data\.label_field \(q\) exclude"),
        ({"labels": "high"}, r"names 1 labels \(high\) for 2 entries of data\.train \(.*a\.jsonl, .*b\.jsonl\)"),
        ({"labels": ["high", "low", "none"]}, r"names 3 labels \(high, low, none\) for 2 entries"),
        ({"labels": []}, r"names 0 labels"),
    ],
)
def test_labels_that_cannot_be(more, message, write, options):
    rows = _dialogues(4)
    given = options(write("a.jsonl", rows[:2]), write("b.jsonl", rows[2:]), **more)
    with pytest.raises(ConfigError, match=message):
        prepare(given, 0, progress=False)
