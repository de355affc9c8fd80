"""Each row format gives the conversation that it means; ids, labels, columns and other names are as documented."""

import json
import math
from collections import Counter

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from sftmix.text.formats import FORMATS, BadRow, Columns, recognise
from sftmix.types import Message
from sftmix.words.errors import ConfigError
from tests.data.test_rows import dialogues
from tests.text.converted import convert

U, A = (lambda text: Message("user", text)), (lambda text: Message("assistant", text, True))

A_TURN = {"role": "assistant", "content": "a"}
TURNS = [{"role": "user", "content": "u"}, A_TURN]
CASES = {
    # As the hub's Alpaca, whose rows have a text, too.
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": " 3\n", "text": "both"}, [U("Add.\n1 2"), A(" 3\n")]),
    "messages": (
        {"messages": [{"role": "system", "content": "S"}, *TURNS]},
        [Message("system", "S"), U("u"), A("a")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "u"}, A_TURN]},
        [U("u"), A("a")],
    ),
    "prompt_completion": (
        {"prompt": [*TURNS, {"role": "user", "content": "v"}], "completion": [A_TURN]},
        [U("u"), Message("assistant", "a"), U("v"), A("a")],
    ),
    "text": ({"text": "a tale", "id": "x"}, [Message("text", "a tale", True)]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_recognised_and_converted(name):
    row, expected = CASES[name]
    if name == "text":  # which has no turns, so that data.format names it
        with pytest.raises(BadRow, match=r"not recognised from the fields 'text', 'id' \(.*data\.format text reads"):
            recognise(row)
    else:
        assert recognise(row) == name
    assert convert(row, name).messages == tuple(expected)


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": "  "}, {"input": "\u200b\ufeff \u2060"}])
def test_alpaca_without_input_is_the_instruction(extra):
    assert convert({"instruction": "Hi.", "output": "Yo", **extra}, "alpaca").messages[0] == U("Hi.")


def test_alpaca_with_an_empty_instruction_is_the_input():
    """As LLaMA-Factory joins them."""
    assert convert({"instruction": "", "input": "Hi.", "output": "Yo"}, "alpaca").messages[0] == U("Hi.")


def test_a_turn_of_weight_0_is_not_trained():
    row = {"messages": [*TURNS, TURNS[0], {**A_TURN, "weight": 0}]}
    assert [m.trained for m in convert(row, "messages").messages] == [False, True, False, False]


@pytest.mark.parametrize(("weight", "expected"), [("0.5", 0.5), ("", 1)])
def test_weights_of_tables(weight, expected):
    assert convert({**CASES["alpaca"][0], "weight": weight}, "alpaca").messages[1].weight == expected


def converted(row, form="auto", **more):
    """A row as `prepare` reads it."""
    return convert(Columns(None).renamed(row), form, **more)


OPTIONAL = ["input", "id", "history", "system", "weight", "tools", "functions", "images", "audio", "label", "note"]
OF_TURNS = ["name", "weight", "tool_calls", "function_call", "from", "value", "images"]


@pytest.mark.parametrize("null", [None, math.nan])
@pytest.mark.parametrize("name", FORMATS)
def test_null_is_an_absent_field(name, null):
    """Tables have a null for each field that a row lacks, and a turn; pandas makes NaN of it in columns of numbers."""
    row = {key: value for key, value in CASES[name][0].items() if value}
    of_others = dict.fromkeys([*OPTIONAL, "messages", "conversations", "instruction", "prompt", "text"], null)
    filled = {
        key: [{**dict.fromkeys(OF_TURNS, null), **turn} if isinstance(turn, dict) else turn for turn in value]
        if isinstance(value, list)
        else value
        for key, value in row.items()
    }
    unread = Counter()
    form = "text" if name == "text" else "auto"
    expected = converted(row, form, label_field="label")
    assert converted(of_others | filled, form, label_field="label", unread=unread) == expected
    assert expected.messages == tuple(CASES[name][1])
    assert set(unread) <= {"'text'"}


@pytest.mark.parametrize(
    "nothing", ["[]", "null", "", " {} ", [], {}, False, {"name": None}, [{"name": None, "a": []}]]
)
def test_lists_and_calls_that_say_nothing_are_none(nothing):
    turns = [TURNS[0], {**A_TURN, "tool_calls": nothing, "function_call": nothing}]
    fields = dict.fromkeys(["tools", "functions", "images", "video", "history"], nothing)
    assert converted({"messages": turns, **fields}).messages == (U("u"), A("a"))


@pytest.mark.parametrize(("given", "expected"), [(5, "5"), (4.0, "4"), ("4.0", "4"), (-3.0, "-3"), (4.5, "4.5")])
def test_numbers_are_ids(given, expected):
    """Of a column with gaps tables make floats."""
    assert converted({"id": given, "instruction": "a", "output": "b"}).id == expected
    assert converted({"id": f"v{given}", "instruction": "a", "output": "b"}).id == f"v{given}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, "true"),
        ("TRUE", "true"),
        (1, "1"),
        (1.0, "1"),
        ("1.0", "1"),
        ("1.10", "1.10"),
        ("a", "a"),
        ("", None),
        (None, None),
    ],
)
def test_label_columns(given, expected):
    """A row may lack the field, or have an empty cell; it has no label then."""
    row = {"instruction": "a", "output": "b", "good": given, "score": 1.5, "tags": ["x"]}
    found = converted(row, label=given, label_field="good")
    assert (found.label, found.columns) == (expected, {"score": 1.5})


def test_fields_that_are_not_read_are_counted_by_name(write, read):
    """Of rows and turns, each once a row, whether they are kept as columns or not; what says nothing is not named."""
    turns = [{**TURNS[0], "date": "x", "rank": False}, {**A_TURN, "date": "y", "thinking": None}]
    parts = [{**TURNS[0], "content": [{"type": "text", "text": "w", "cache_control": {"type": "z"}}]}, A_TURN]
    rows = [
        {"messages": turns, "source": "web", "text": "beside", "tags": ["a"], "lang": "", "meta": {"a": None}},
        {"messages": parts, "source": "web", "weight": 0.5, "system": "S", "id": 1, "none": 0},
        {"messages": [], "bad": 1},
    ]
    path = write("rows.jsonl", rows)
    (note,) = read(path, skip_bad=True).report.notes
    assert note == (
        "data.train: 6 fields not in the text: 'source' (2 rows), 'messages[].date' (1 row), "
        "'messages[].rank' (1 row), 'tags' (1 row), 'text' (1 row), 'none' (1 row)"
    )
    own = write("own.jsonl", [{"prompt": "p", "completion": "c", "k\x1b": 1}])
    lines = read(path, eval=[own], skip_bad=True).report.lines()
    assert r"data.eval: 1 field not in the text: 'k\x1b' (1 row)" in lines
    many = [{"instruction": "u", "output": "a", **{f"k{i}": 1 for i in range(40)}}]
    (note,) = read(write("many.jsonl", many)).report.notes
    assert note.startswith("data.train: 40 fields not in the text: ")
    assert note.count("(1 row)") == 30


def test_a_single_turn_is_read_as_closely_as_a_list_of_one(write, read, refused):
    turn = {**TURNS[0], "date": "x"}
    rows = [{"prompt": turn, "completion": "a", "loss_weight": 0.5}]
    (note,) = read(write("rows.jsonl", rows)).report.notes
    assert note == "data.train: 1 field not in the text: 'prompt[].date' (1 row)"
    path = write("seen.jsonl", [{"prompt": {**turn, "images": ["a.png"]}, "completion": "a"}])
    assert refused(path)[1].startswith(f"{path}:1: prompt[].images is ['a.png']: images, videos")


def test_documents_may_list_tools_and_no_images(write, read, refused):
    """What plain text does not read is named, too: it has no system message and no weight."""
    row = {"text": "def f(): ...", "functions": ["f"], "system": "S", "weight": 2, "images": None}
    (note,) = read(write("rows.jsonl", [row]), format="text").report.notes
    assert note == "data.train: 3 fields not in the text: 'functions' (1 row), 'system' (1 row), 'weight' (1 row)"
    path = write("seen.jsonl", [{"text": "<image> A page.", "image": "a.png"}])
    assert refused(path, format="text")[1].startswith(f"{path}:1: image is 'a.png': images, videos")


def test_earlier_turns_beside_a_row_are_refused(write, refused):
    """They would be lost, and the answer with them."""
    path = write("rows.jsonl", [{"instruction": "u", "output": "a", "history": [["q", "r"]]}])
    assert refused(path)[1].startswith(f"{path}:1: history is [['q', 'r']]: images, videos, sound and a history are ")


def test_a_field_by_another_name_is_what_it_is_named(write, read):
    """A prompt or a label may stand in a column `image`: then it is text."""
    row = {"image": "A cat on a mat.", "caption": "Cat.", "video": "short"}
    columns = {"prompt": "image", "response": "caption"}
    train = read(write("rows.jsonl", [row]), columns=columns, label_field="video").train
    assert (contents(train), train.values("label")) == ([["A cat on a mat.", "Cat."]], ["short"])


def test_deep_fields_that_are_not_read(write, read):
    row = b'{"instruction": "u", "output": "a", "meta": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}"
    assert read(write("rows.jsonl", row)).report.notes == ["data.train: 1 field not in the text: 'meta' (1 row)"]


def contents(side) -> list[list[str]]:
    return [[m.content for m in example.messages] for example in side.examples(whole=True)]


def test_the_same_rows_from_every_kind_of_file(write, read, tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "" if i % 2 else 'x, "y"\nz', "output": f"{i}é"} for i in range(7)]
    table = pa.Table.from_pylist(rows)
    csv.write_csv(table, tmp_path / "c.csv")
    pq.write_table(table, tmp_path / "d.parquet")
    paths = [write("a.json", rows), write("b.jsonl", rows), str(tmp_path / "c.csv"), str(tmp_path / "d.parquet")]
    lines = write("lines.json", "".join(json.dumps(row) + "\n" for row in rows))  # JSONL under the name .json
    expected = contents(read(paths[1]).train)
    assert len(expected) == 7
    for path in (*paths, lines):
        assert contents(read(path).train) == expected
    folder = read(str(tmp_path))  # five files, sorted
    assert contents(folder.train) == expected * 5
    sources = folder.train.values("source")
    assert sources[7].endswith("/b.jsonl:1")
    assert sources[21 + 3].endswith("/d.parquet[3]")
    assert folder.report.counts["duplicate"] == 28


def test_every_row_is_recognised_by_itself_and_a_named_format_is_kept(write, read, refused):
    rows = [
        {"instruction": "u", "output": "a"},
        {"messages": [*TURNS, {"role": "user", "content": "w"}, A_TURN]},
        {"prompt": "u", "completion": "a"},
    ]
    path = write("mixed.jsonl", rows)
    train = read(path).train
    assert contents(train) == [["u", "a"], ["u", "a", "w", "a"], ["u", "a"]]
    ids = train.values("id")
    assert ids[2] == ids[0] + "#1"  # the same content
    assert refused(path, format="alpaca")[1].startswith(
        f"{path}:2: field 'instruction' is missing or null; there are 'messages'"
    )
    bad = write("bad.jsonl", [rows[0], {"instruction": "w"}])
    assert refused(bad)[1].startswith(f"{bad}:2: field 'output' is missing")


def test_each_turn_is_an_example_with_its_history(write, read):
    """Turn numbers do not count a system message; turns without text are skipped."""
    turns = ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user"]
    row = {"messages": [{"role": r, "content": "" if i == 4 else f"t{i}"} for i, r in enumerate(turns)], "id": "c"}
    prepared = read(write("rows.jsonl", [row, *dialogues(1)]))
    assert prepared.report.counts == {"empty_response": 1, "unanswered": 1, "system": 1}

    def found(whole: bool) -> list:
        chats = prepared.train.examples(whole=whole)
        return [(e.id, len(e.messages), [i for i, m in enumerate(e.messages) if m.trained]) for e in chats]

    assert found(False) == [("c@turn0", 3, [2]), ("c@turn2", 7, [6]), ("c0", 2, [1])]
    assert found(True) == [("c", 7, [2, 6]), ("c0", 2, [1])]


@pytest.mark.parametrize("name", ["alpaca", "prompt_completion"])
def test_a_system_field_is_the_first_turn(name):
    row, expected = CASES[name]
    found = convert({**row, "system": "S"}, name)
    assert found.messages == (Message("system", "S"), *expected)
    assert "system" not in found.columns
    with pytest.raises(BadRow, match=r"has a field system and a system turn; leave one out .*\{system: null\}"):
        convert({**CASES["messages"][0], "system": "T"}, "messages")


def test_parts_of_type_text_are_one_text():
    """In tables each part has all the fields of the others."""
    split = [["one", " two"], ["three\n", "\nfour", ""]]
    parts = [[{"type": "text", "text": text, "image_url": None} for text in texts] for texts in split]
    row = {"messages": [{**turn, "content": content} for turn, content in zip(TURNS, parts, strict=True)]}
    assert convert(row, "messages").messages == (U("one two"), A("three\n\nfour"))


# ----------------------------------------------------------------- field names of the rows' own (data.columns)


ROWS = [{"question": f"Say {i}.", "answer": f"{i}!", "kind": "odd" if i % 2 else "even"} for i in range(8)]
COLUMNS = {"prompt": "question", "response": "answer"}


def test_rows_are_those_that_were_renamed_by_hand(write, read):
    """They have the same ids; the other fields keep their names. The columns belong to the identity of the rows."""
    by_hand = [{"prompt": r["question"], "completion": r["answer"], "kind": r["kind"]} for r in ROWS]
    expected = read(write("hand.jsonl", by_hand), label_field="kind").train
    path = write("rows.json", ROWS)
    train = read(path, columns=COLUMNS, label_field="kind").train
    assert contents(train) == contents(expected) == [[r["question"], r["answer"]] for r in ROWS]
    for column in ("id", "label", "columns"):
        assert train.values(column) == expected.values(column)
    other = read(path, columns={"prompt": "question", "response": "kind"}).train
    assert contents(other)[0] == ["Say 0.", "even"]
    assert train.key != other.key


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"instruction": "q", "output": "r"}, {"q": "u", "r": "a"}, "u|a"),
        ({"instruction": "input", "input": "instruction"}, {"input": "u", "instruction": "c", "output": "a"}, "u\nc|a"),
        ({"prompt": "question", "id": "key"}, {"question": "u", "completion": "a", "key": "k"}, "u|a"),
        ({**COLUMNS, "system": "rules"}, {"question": "u", "answer": "a", "rules": "Be short."}, "Be short.|u|a"),
        # The rows also have the fields of another format, which comes first without data.columns.
        ({"prompt": "q", "response": "r"}, {"q": "u", "r": "a", "instruction": "x", "output": "y"}, "u|a"),
    ],
)
def test_fields_of_each_format(columns, row, expected, write, read):
    train = read(write("rows.jsonl", [row]), columns=columns).train
    assert ["|".join(texts) for texts in contents(train)] == [expected]
    assert "key" not in row or train.values("id") == ["k"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_null_in_a_column_is_not_the_rows_own_field_of_our_name(kind, tmp_path, read):
    table = pd.DataFrame({"instruction": list("uvw"), "output": "theirs", "better": ["a", None, "c"], "input": "x"})
    path = str(tmp_path / f"rows.{kind}")
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        (table.to_csv if kind == "csv" else table.to_parquet)(path, index=False)
    prepared = read(path, columns={"output": "better"}, skip_bad=True)
    assert contents(prepared.train) == [["u\nx", "a"], ["w\nx", "c"]]
    reason = "empty_response" if kind == "csv" else "bad_row"  # as of a field without another name
    assert prepared.report.counts == {reason: 1}


def test_files_with_our_names_go_beside_them(write, read):
    own = write("own.jsonl", [{"instruction": "u", "output": "a"}])
    assert contents(read(write("rows.jsonl", ROWS), own, columns=COLUMNS).train)[-1] == ["u", "a"]


def test_columns_that_are_not_there(write, read, refused):
    path = write("rows.jsonl", ROWS)
    assert refused(path, columns={"prompt": "qestion", "response": "answer"}) == [
        "data.columns, data.label_field: no row of data.train has the field 'qestion' (for prompt); the fields there "
        "are 'question', 'answer', 'kind'"
    ]
    assert "no row of data.train has the field 'knd' (for the label); " in refused(path, label_field="knd")[0]
    for columns, form, message in (
        ({"prmpt": "question", "response": "answer"}, "auto", "no format that .* has prmpt and response; .*sharegpt: "),
        (COLUMNS, "alpaca", r"no format that .* has prompt and response; .* \(alpaca: instruction, input, output; "),
    ):
        with pytest.raises(ConfigError, match=rf"^data\.columns.*{message}"):
            read(path, columns=columns, format=form)
