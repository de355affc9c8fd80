"""Every kind of broken input is refused with file, line and reason, or dropped and counted; ids and options of rows."""

import json
import re

import pytest

from sftmix.data.report import Case, DataReport
from sftmix.words.errors import ConfigError, DataError
from tests.fast import some_fast

GOOD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'


def turns(*pairs: tuple[object, object]) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}).encode()


def reply(content: object) -> bytes:
    return turns(("user", "Hi"), ("assistant", content))


def said(words: bytes) -> bytes:
    """The good row with these words in place of the content of its answer, and perhaps more fields."""
    return GOOD.strip().replace(b'"Yo"', words)


def more(field: bytes) -> bytes:
    """The good row with one more field, which is the first."""
    return b"{" + field + b", " + GOOD[1:].strip()


BAD_LINES = {
    "truncated": (GOOD[:40], "not valid JSON"),
    "invalid UTF-8": (said(b'"\xff\xfe"'), "not valid JSON in UTF-8"),
    "lone surrogate": (
        rb'{"messages":[{"role":"user","content":"\ud800"},{"role":"assistant","content":"a"}]}',
        "lone",
    ),
    "NUL escape": (reply("a\0b"), "NUL"),
    "the mark of a special token": (reply("a\ufdd0b"), "messages[1].content contains a NUL character, or U+FDD0"),
    "content null": (reply(None), "messages[1] has no 'content', or null"),
    "tool calls": (
        said(b'"Yo", "tool_calls": [{"x": 1}]'),
        "messages[1].tool_calls has {'x': 1}; expected an object with a name",
    ),
    "tools": (
        more(b'"tools": [{"type": "function"}]'),
        "tools has {'type': 'function'}; expected an object with a name",
    ),
    "tools as text": (more(rb'"tools": "[{\"type\": 1}]"'), "tools has {'type': 1}"),
    "images": (
        more(b'"images": ["a.png"]'),
        "images is ['a.png']: images, videos, sound and a history are not supported",
    ),
    "an image by its address": (
        b'{"instruction": "What is it?", "output": "A cat.", "image": "http://a/b.png"}',
        "image is 'http://a/b.png'",
    ),
    "sound of bytes": (more(b'"audio": {"bytes": "x", "path": null}'), "audio is {"),
    "images of a turn": (said(b'"Yo", "images": ["iVBOR"]'), "messages[].images is ['iVBOR']"),
    "image": (
        reply([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[1].content[1] is {'type': 'image_url'",
    ),
    "missing messages": (b'{"message": 1}', "format not recognised from the fields 'message'"),
    "empty messages": (b'{"messages": []}', "messages must be a list of turns, found []"),
    "a turn is text": (b'{"messages": ["Hi"]}', "messages[0].from is None in 'Hi'; known: "),
    "no content": (b'{"messages": [{"role": "user"}]}', "has no 'content'"),
    "blank user": (turns(("user", " \n"), ("assistant", "a")), "turn 1 (user) is empty"),
    "unknown role": (turns(("user", "Hi"), ("critic", "a")), "'critic'"),
    "no assistant": (turns(("user", "Hi")), "no assistant turn"),
    "same role twice": (turns(("user", "Hi"), ("user", "a"), ("assistant", "b")), "expected assistant's"),
    "scalar line": (b"42", "expected an object"),
    "deeper": (b'{"messages": ' + b"[" * 200000, "recursion"),
    "huge number": (b'{"messages": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "weight below 0": (said(b'"Yo", "weight": -1'), "messages[1].weight is -1; allowed"),
    "weight beyond all floats": (said(b'"Yo", "weight": 1' + b"0" * 400), "allowed: a number from 0 to 1e+06"),
    "weight beyond float32": (more(b'"weight": 1e39'), "weight is 1e+39; allowed: a number from 0 to 1e+06"),
    "weight of a turn beyond float32": (said(b'"Yo", "weight": 1e39'), "weight is 1e+39; allowed: a number from 0"),
    "tools within tools": (
        more(b'"tools": "[{\\"name\\": \\"f\\", \\"a\\": ' + b"[" * 450 + b"]" * 450 + b'}]"'),
        "it has more than 100 levels",
    ),
    "weight in words": (more(b'"weight": "high"'), "weight is 'high'; allowed: a number from 0"),
    "no weight": (more(b'"weight": 0'), "no assistant turn to train on"),
    "no turn with a weight": (said(b'"Yo", "weight": 0'), "no assistant turn to train on"),
    "surrogate elsewhere": (more(rb'"note": "\ud800"'), "field 'note' contains a lone surrogate"),
    "surrogate in a name": (more(rb'"\ud800": 1'), r"field '\ud800' contains a lone"),
    "id of a list": (more(b'"id": [1]'), "id must be a string, found [1]"),
    "id infinite": (more(b'"id": Infinity'), "id must be a string, found inf"),
    "id of a terminal": (more(rb'"id": "x\u001b]0;t\u0007"'), r"the control character '\x1b'"),
    "id reserved": (more(b'"id": "a@turn0"'), "@turn"),
}


def test_quoted_values_are_cut_and_five_names_are_kept(write, read, refused):
    """A message is for people; a row may have 16 MiB."""
    long = "a\x1b" * 100_000
    rows = [
        turns(("user", "Hi"), (long, "Yo")),
        reply([{"type": long}]),
        b'{"id": "' + b"a" * 99_999 + b'@turn1", ' + GOOD[1:].strip(),
        *[json.dumps({long: 1}).encode()] * 3,
    ]
    path = write("rows.jsonl", b"\n".join([GOOD.strip(), *rows]))
    message = "\n".join(refused(path))
    assert "6 bad rows" in message
    assert len(message) < 2000
    assert "\x1b" not in message
    report = read(path, skip_bad=True).report
    assert len(report.first["bad_row"]) == 5
    lines = report.lines()
    at = lines.index("6 bad rows skipped (data.skip_bad); sftmix preview --bad FILE names all:")
    assert [line.split(": ")[0] for line in lines[at + 1 :]] == [f"  {path}:{number}" for number in range(2, 7)]
    assert "sftmix preview --bad FILE names all" in message


def test_explicit_id_twice_is_an_error_and_content_ids_count(write, read, refused):
    rows = [
        {"id": 7, "instruction": "a", "output": "b"},
        {"instruction": "a", "output": "c"},
        {"id": "7", "instruction": "x", "output": "y"},
        {"instruction": "a", "output": "c"},
        {"instruction": "a", "output": "c"},
    ]
    path = write("rows.jsonl", rows)
    assert (
        refused(path)[1] == f"{path}:3: the id '7' is taken by an earlier row; data.columns '{{id: null}}' reads no ids"
    )
    prepared = read(path, skip_bad=True)
    ids = prepared.train.values("id")
    assert ids[0] == "7"
    assert ids[2:] == [ids[1] + "#1", ids[1] + "#2"]
    assert prepared.report.counts == {"bad_row": 1, "duplicate": 2}
    plain = ids[1]
    own = {"id": f"{plain}#1", "instruction": "of its own", "output": "d"}
    early = read(write("early.jsonl", [rows[1], own, rows[1], rows[1]])).train.values("id")
    assert early == [plain, f"{plain}#1", f"{plain}#2", f"{plain}#3"]
    late = write("late.jsonl", [rows[1], rows[1], own])
    assert refused(late)[1].startswith(f"{late}:3: the id '{plain}#1' is taken by an earlier row")


def test_duplicates_are_counted_behind_what_is_left_out_and_dropped_before_rows_are_held_out(write, read, tmp_path):
    """By their turns and functions, with ids of their own or without."""
    rows = [{"id": f"r{k}", "instruction": f"a{k % 4}", "output": "b"} for k in range(9)]
    rows.append({"id": "t", "messages": [*said("a0", "b")], "tools": [{"name": "f", "parameters": {}}]})
    path = write("rows.jsonl", rows)
    (tmp_path / "out.txt").write_text("r8\n")
    kept, excluded = read(path), read(path, exclude=str(tmp_path / "out.txt"))
    assert (len(kept.train.records), kept.report.counts) == (10, {"duplicate": 5})
    assert excluded.report.counts == {"excluded": 1, "duplicate": 4}
    left = read(path, duplicates="drop", eval_fraction=0.5)
    assert left.report.counts["dropped_duplicate"] == 5
    assert {*left.train.values("id"), *left.eval.values("id")} == {"r0", "r1", "r2", "r3", "t"}


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_rows_that_are_trained_otherwise_have_other_ids(write, read):
    """In any order; what rows without such fields have is the hash of their turns alone."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    plain = {"messages": said}
    parts = [{"type": "text", "text": "b", "weight": weight} for weight in (2, 1)]
    rows = [
        plain,
        *({**plain, "tools": [{"name": name, "parameters": {}}]} for name in "fg"),
        *({**plain, "weight": weight} for weight in (0.5, 2)),
        *({"messages": [*said[:k], {**said[k], "weight": 2}, *said[k + 1 :]]} for k in (1, 3)),
        {"messages": [*said[:3], {"role": "assistant", "content": "bb"}]},
        *({"messages": [*said[:3], {"role": "assistant", "content": order}]} for order in (parts, parts[::-1])),
    ]
    ids = read(write("rows.jsonl", rows)).train.values("id")
    assert len(set(ids)) == len(rows)
    assert not [name for name in ids if "#" in name]
    assert read(write("turned.jsonl", rows[::-1])).train.values("id") == ids[::-1]
    same = [plain, {**plain, "weight": 1, "tools": [], "note": "x"}]
    twice = read(write("same.jsonl", same))
    assert twice.train.values("id") == [ids[0], f"{ids[0]}#1"]
    held_out = read(write("train.jsonl", rows[3:4]), eval=[write("eval.jsonl", rows[:1])])
    assert held_out.report.counts == {"eval_in_train": 1}
    assert ids[0] == "980d6e2b0082d77a"  # a file of other runs may name it


def test_ids_that_begin_anew_in_each_file_are_not_read(write, read, refused):
    """{id: null}: the ids are those of the same rows without the field, in any order of the files."""
    shards = [[{"id": i, "instruction": f"{tag}{i}", "output": "b"} for i in range(2)] for tag in "xy"]
    names = [write(f"{place}.jsonl", shard) for place, shard in enumerate(shards)]
    assert "data.columns '{id: null}'" in refused(*names)[1]
    bare = [{key: row[key] for key in ("instruction", "output")} for shard in shards for row in shard]
    ids = read(write("bare.jsonl", bare)).train.values("id")
    assert read(*names, columns={"id": None}).train.values("id") == ids
    assert read(*names[::-1], columns={"id": None}).train.values("id") == [*ids[2:], *ids[:2]]


def test_a_field_that_is_not_read_is_no_field(write, read):
    row = {"key": "k1", "id": 1, "q": "Hi", "completion": "Yo", "system": "Be brief.", "weight": 0}
    columns = {"prompt": "q", "system": None, "weight": None}
    (plain,) = read(write("rows.jsonl", [row]), columns=columns).train.examples(whole=True)
    assert ([turn.content for turn in plain.messages], plain.id) == (["Hi", "Yo"], "1")
    assert plain.columns == {"key": "k1"}
    assert read(write("rows.jsonl", [row]), columns={**columns, "id": "key"}).train.values("id") == ["k1"]


def test_empty_responses_are_dropped_and_counted(write, read, refused):
    rows = [{"instruction": "a", "output": out} for out in ("b", "", " \n", "c")]
    report = read(write("rows.jsonl", rows)).report
    assert (report.counts, report.rows) == ({"empty_response": 2}, 4)
    lines = refused(write("none.jsonl", rows[1:3]))
    assert "no usable row is left" in lines[0]
    assert "2 empty responses" in lines[-1]


def test_no_name_in_the_report_adds_a_line_or_a_colour():
    """The names of files and the words of a template come from others, too."""
    report = DataReport(notes=["The template writes '\x1b[31m' \t."])
    report.add("template_refused", Case("x\n0 bad rows.jsonl:1", "a"))
    lines = report.lines()
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(lines))
    assert len(lines) == 3
    assert lines[-1].endswith(r": a (x\n0 bad rows.jsonl:1)")


# ------------------------------------------------------------------------------------------- files and options


def dialogues(n: int) -> list[dict]:
    """Conversations of one, two and three turns in turn."""
    return [
        {
            "id": f"c{i}",
            "messages": [{"role": r, "content": f"{r}{i}{t}"} for t in range(1 + i % 3) for r in ("user", "assistant")],
        }
        for i in range(n)
    ]


def test_each_file_has_its_label(write, read, tmp_path):
    rows = dialogues(6)
    (tmp_path / "many").mkdir()
    write("many/a.jsonl", rows[:2])
    write("many/b.jsonl", rows[2:3])
    names, held_out = (str(tmp_path / "many"), write("high.jsonl", rows[3:])), write("held.jsonl", dialogues(9)[7:])
    prepared = [read(*names, eval=[held_out], labels=labels) for labels in (["low", "high"], ["low", "low"])]
    labels = [side.train.values("label") for side in prepared]
    assert labels == [["low"] * 3 + ["high"] * 3, ["low"] * 6]
    assert prepared[0].eval.values("label") == [None] * 2
    assert len({side.train.key for side in prepared}) == 2


def test_a_side_is_not_read_back_as_the_other(write, read):
    """What is checked and said of training rows is not of held-out ones."""
    one, other = (write(name, [{**row, "date": "x"} for row in dialogues(3)]) for name in ("a.jsonl", "b.jsonl"))
    read(one, eval=[other])
    assert read(other).report.notes == ["data.train: 1 field not in the text: 'date' (3 rows)"]
    with pytest.raises(DataError, match=r"no row of data\.train has the field 'nope'"):
        read(other, columns={"id": "nope"})


OF_TEXT = [
    ("template", "alpaca"),
    ("template_options", {"enable_thinking": True}),
    ("thoughts", "drop"),
    ("multi_turn", "whole"),
    ("trained_turns", "last"),
    ("label_field", "q"),
    ("labels", ["high"]),
]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (dialogues(4), {"eval_fraction": 0.99}, r"data\.eval_fraction = 0\.99 of 4 rows leaves no training row"),
        (dialogues(4), {"packing": True}, r"data\.packing"),
        *(
            (
                [{"text": "a tale", "q": "high"}],
                {"format": "text", name: value},
                rf"data\.{name} \(.*\) and data\.format text exclude",
            )
            for name, value in OF_TEXT
        ),
    ],
)
def test_options_that_cannot_be(rows, more, message, write, read):
    with pytest.raises(ConfigError, match=message):
        read(write("rows.jsonl", rows), **more)


def test_text_and_conversations_do_not_mix(write, read):
    text, chat = write("a.txt", "Text.\n"), write("b.jsonl", [{"instruction": "a", "output": "b"}])
    for names, more, message in (
        ([text, chat], {}, r"a\.txt: format not recognised from the fields 'text' .*, which data\.format text reads"),
        ([text], {"eval": [chat]}, r"data.train or data.eval holds plain text, the other conversations"),
        (
            [text],
            {"format": "alpaca"},
            r"a\.txt: field 'instruction' is missing or null; there are 'text'",
        ),
    ):
        with pytest.raises(DataError, match=message):
            read(*names, **more)
    assert read(chat, text, skip_bad=True).report.counts == {"bad_row": 1}


@pytest.mark.parametrize(
    ("name", "rows"),
    some_fast(
        [
            ("medical/medquad_4k.jsonl", 4000),
            ("multiturn/sgd_messages_2k.jsonl", 2000),
            ("alpaca/alpaca_8k.json", 8229),
        ],
        every=3,
    ),
)
def test_real_files_hold_no_bad_row(name, rows, shared, read):
    report = read(str(shared / "data" / name)).report
    assert report.rows == rows
    assert "bad_row" not in report.counts
