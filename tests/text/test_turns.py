"""Conversations as other projects have them: thoughts, flags, calls of functions and their results, preferences."""

import json
from collections import Counter

import pytest

from sftmix.text.values import BadRow
from sftmix.types import Message
from tests.text.converted import convert
from tests.text.test_formats import A, U

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
BARE = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
}
TOOL = {"type": "function", "function": BARE}


def call(x: object, call_id: str = "call00001", name: str = "add") -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {"x": x}}}


def called(*calls: dict, content: str = "", **more) -> Message:
    return Message("assistant", content, True, more={"tool_calls": list(calls)}, **more)


def result(content: str, call_id: str = "call00001", name: str = "add") -> Message:
    return Message("tool", content, more={"name": name, "tool_call_id": call_id})


def turns(*given: dict, **row: object) -> dict:
    return {"messages": [USER, *given], **row}


def said(*pairs: tuple[str, object], **row: object) -> dict:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs], **row}


def answer(**fields: object) -> dict:
    return {**ANSWER, **fields}


def assistant(content: str, **fields) -> Message:
    return Message("assistant", content, **{"trained": True, **fields})


def masked(weight: float = 0.0) -> Message:
    return Message("assistant", "a", False, weight)


CALL = call(1)
RESULT = {"role": "tool", "content": "2", "tool_call_id": "call00001", "name": "add"}
SPELT = json.dumps({"name": "add", "arguments": {"x": 1}})
GOOD = {
    # Thoughts.
    "reasoning_content": (turns(answer(reasoning_content="r")), [U("u"), assistant("a", thought="r")]),
    "reasoning": (turns(answer(reasoning="r", thinking=None)), [U("u"), assistant("a", thought="r")]),
    "thinking": (turns(answer(thinking="r\n", reasoning="")), [U("u"), assistant("a", thought="r\n")]),
    "one thought twice": (
        turns(answer(content="<think>\nr\n</think>\n\na", reasoning_content="r", reasoning="r")),
        [U("u"), assistant("a", thought="r")],
    ),
    "a thought in the content stays": (turns(answer(content="<think>r</think>a")), [U("u"), A("<think>r</think>a")]),
    "a thought before a call": (
        turns(answer(content=None, tool_calls=[CALL], reasoning="r")),
        [U("u"), called(CALL, thought="r")],
    ),
    # Flags.
    **{
        f"{name} {value!r}": (turns(answer(**{name: value}), USER, ANSWER), [U("u"), masked(), U("u"), A("a")])
        for name in ("train", "training", "trainable", "loss", "loss_mask", "mask")
        for value in (False, 0, "false")
    },
    **{
        f"{name} {value!r}": (turns(answer(**{name: value})), [U("u"), A("a")])
        for name, value in [("train", True), ("loss", 1), ("loss_mask", 1.0), ("mask", True), ("masked", False)]
    },
    **{
        f"masked {value!r}": (turns(answer(masked=value), USER, ANSWER), [U("u"), masked(), U("u"), A("a")])
        for value in (1, "1")
    },
    "masked 0": (turns(answer(masked=0)), [U("u"), A("a")]),
    "masked": (turns(answer(masked=True), USER, ANSWER), [U("u"), masked(), U("u"), A("a")]),
    "flags agree": (turns(answer(train=False, loss=0, weight=1), USER, ANSWER), [U("u"), masked(), U("u"), A("a")]),
    "a user's flag": (
        {"messages": [{**USER, "train": False}, answer(train=True)]},
        [Message("user", "u", weight=0.0), A("a")],
    ),
    "weights of rows and turns": (
        turns(answer(weight=0.5), weight=3),
        [Message("user", "u", weight=3.0), assistant("a", weight=1.5)],
    ),
    "loss_weight": (turns(answer(loss_weight=0.0), USER, ANSWER), [U("u"), masked(), U("u"), A("a")]),
    "parts with a flag": (
        turns(answer(content=[{"type": "text", "text": "x", "train": False}, {"type": "text", "text": " y"}])),
        [U("u"), assistant("x y", parts=(("x", 0.0), (" y", 1.0)))],
    ),
    "parts with weights": (
        turns(answer(content=[{"type": "text", "text": t, "weight": w} for t, w in [("x", 0.25), ("y", 2)]], weight=2)),
        [U("u"), assistant("xy", weight=2.0, parts=(("x", 0.25), ("y", 2.0)))],
    ),
    "parts of one weight": (
        turns(answer(content=[{"type": "text", "text": t, "weight": 0.5} for t in "xy"])),
        [U("u"), assistant("xy", weight=0.5)],
    ),
    "parts with a value": (
        turns(answer(content=[{"type": "text", "value": "a"}], loss_weight=1.0)),
        [U("u"), A("a")],
    ),
    # Roles.
    "roles of others": (
        said(
            ("developer", "S"),
            ("human", "u"),
            ("chatgpt", "a"),
            ("human", "v"),
            ("bot", "b"),
            ("user", "w"),
            ("model", "c"),
        ),
        [Message("system", "S"), U("u"), A("a"), U("v"), A("b"), U("w"), A("c")],
    ),
    # Calls.
    "OpenAI": (
        turns(answer(content=None, tool_calls=[CALL]), RESULT, ANSWER),
        [U("u"), called(CALL), result("2"), A("a")],
    ),
    "arguments as text": (
        turns(answer(tool_calls=[{"id": "call00001", "function": {"name": "add", "arguments": '{"x": null}'}}])),
        [U("u"), called(call(None), content="a")],
    ),
    "null of tables in arguments": (
        turns(
            answer(content="", tool_calls=[call(1) | {"function": {"name": "add", "arguments": {"x": 1, "y": None}}}])
        ),
        [U("u"), called(CALL)],
    ),
    "no arguments": (
        turns({"role": "assistant", "tool_calls": [{"id": "i", "function": {"name": "now", "arguments": ""}}]}),
        [U("u"), called({"id": "i", "type": "function", "function": {"name": "now", "arguments": {}}})],
    ),
    "function_call": (
        turns(
            {"role": "assistant", "function_call": json.loads(SPELT) | {"id": "call00001"}},
            {"role": "function", "name": "add", "content": "2"},
            ANSWER,
        ),
        [U("u"), called(CALL), result("2"), A("a")],
    ),
    "results as objects": (
        turns(answer(content="", tool_calls=[CALL]), {**RESULT, "content": {"sum": [2, "é"]}}, ANSWER),
        [U("u"), called(CALL), result('{"sum": [2, "é"]}'), A("a")],
    ),
    "results in parts": (
        turns(answer(content="", tool_calls=[CALL]), {**RESULT, "content": [{"type": "text", "text": "2"}]}, ANSWER),
        [U("u"), called(CALL), result("2"), A("a")],
    ),
    **{
        f"a result of {value}": (
            turns(answer(content="", tool_calls=[CALL]), {**RESULT, "content": value}, ANSWER),
            [U("u"), called(CALL), result(json.dumps(value)), A("a")],
        )
        for value in (
            [],
            [{"type": "museum", "name": "Munch"}],
            [{"type": "email", "email": "a@b.no"}, {"type": "video", "title": "a"}],
            [{"type": ["object", "null"]}],
            [{"city": "Oslo", "image": "http://a/b.png"}],
            [{"type": "text", "text": "a"}, "b"],
        )
    },
    "results in any order, and a call at the end": (
        turns(
            answer(content="", tool_calls=[call(1, "i"), call(2, "j")]),
            {"role": "tool", "content": "4", "tool_call_id": "j"},
            {"role": "tool", "content": "2", "tool_call_id": "i"},
            answer(content="", tool_calls=[call(3, "k")]),
        ),
        [U("u"), called(call(1, "i"), call(2, "j")), result("4", "j"), result("2", "i"), called(call(3, "k"))],
    ),
    "calls in the content": (
        said(("human", "u"), ("gpt", "<tool_call>x</tool_call>"), ("tool", "2"), ("gpt", "a")),
        [U("u"), A("<tool_call>x</tool_call>"), Message("tool", "2"), A("a")],
    ),
    # Preferences that are read on purpose: `chosen` under the name of the completion.
    "a completion is one turn": (
        {"prompt": [{"from": "human", "value": "u"}], "completion": {"from": "gpt", "value": "a"}},
        [U("u"), A("a")],
    ),
    "a completion goes on with a prompt of turns": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]},
        [U("u"), Message("assistant", "a"), U("u"), A("a"), U("u"), A("a")],
    ),
    "a completion of text": ({"prompt": [USER], "completion": "a"}, [U("u"), A("a")]),
    "an answer that is liked": (turns(ANSWER, label=True), [U("u"), A("a")]),
}


@pytest.mark.parametrize("name", GOOD)
def test_conversations(name):
    row, expected = GOOD[name]
    unread = Counter[str]()
    found = convert(row, "auto", ["prompt_completion"] if "prompt" in row else [], unread=unread).messages
    assert found == tuple(expected)
    assert not [name for name in unread if "content" in name]


def test_ids_of_calls_are_made_of_their_places():
    """Nine letters and digits, the same in every row; results answer calls in their order."""
    row = said(
        ("human", "u"),
        ("function_call", f"[{SPELT}, {SPELT}]"),
        ("observation", "2"),
        ("observation", "3"),
        ("gpt", "a"),
        ("human", "v"),
        ("function_call", SPELT),
        ("observation", {"y": 1}),
        ("gpt", "b"),
    )
    found = convert(row, "auto").messages
    assert found == convert(json.loads(json.dumps(row)) | {"id": "other"}, "auto").messages
    ids = [one["id"] for turn in found for one in turn.more.get("tool_calls", [])]
    assert all(len(one) == 9 and one.isalnum() for one in ids)
    assert len(set(ids)) == 3
    assert [turn.more["tool_call_id"] for turn in found if turn.role == "tool"] == ids
    assert found[1] == called(call(1, ids[0]), call(1, ids[1]))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [BARE]},
        {"functions": [BARE], "tools": []},
        {"tools": json.dumps([TOOL])},
        {"functions": json.dumps([BARE])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [{"type": "function", "function": {**BARE, "parameters": json.dumps(BARE["parameters"])}}]},
        {"tools": [{**TOOL, "function": {**BARE, "strict": None}}]},
    ],
    ids=str,
)
def test_functions_of_a_row(fields):
    for row in (turns(ANSWER), {"instruction": "u", "output": "a"}, {"prompt": "u", "completion": "a"}):
        found = convert({**row, **fields}, "auto")
        assert (found.tools, found.columns) == ((TOOL,), {})


def test_roles_of_ones_own_and_the_last_turn_alone():
    row = said(("ask", "u"), ("reply", "a"), ("ask", "v"), ("reply", "b"))
    roles = {"ask": "user", "reply": "assistant"}
    assert convert(row, "auto", roles=roles).messages == (U("u"), A("a"), U("v"), A("b"))
    assert convert(row, "auto", roles=roles, last=True).messages == (U("u"), Message("assistant", "a"), U("v"), A("b"))


def test_a_part_may_have_its_text_twice():
    part = {"type": "text", "text": "a", "value": "a", "content": None}
    assert convert(turns(answer(content=[part])), "auto").messages == (U("u"), A("a"))


BAD = {
    "two thoughts": (turns(answer(reasoning="r", thinking="s")), "different thoughts in thinking and reasoning"),
    "two thoughts, one inside": (turns(answer(content="<think>s</think>a", reasoning="r")), "another in its content"),
    "a user's thought": ({"messages": [{**USER, "reasoning": "r"}, ANSWER]}, "messages[0] has a thought or a call"),
    "a thought of numbers": (turns(answer(thinking=1)), "messages[1].thinking must be a string, found 1"),
    "flags that contradict": (turns(answer(train=True, loss=0)), "messages[1] (assistant) has {'train': True"),
    "a flag against a weight": (turns(answer(train=True, weight=0)), "flags must agree"),
    "a flag asks for a user": (
        {"messages": [{**USER, "train": True}, ANSWER]},
        "messages[0] (user) has {'train': True}",
    ),
    "a part asks for a user": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "u", "train": 1}]}, ANSWER]},
        "messages[0].content[0] (user) has",
    ),
    "a thought in parts": (
        turns(answer(thinking=[{"type": "text", "text": "r", "train": False}])),
        "messages[1].thinking must be a string, found [{",
    ),
    "a part with two texts": (
        turns(answer(content=[{"type": "text", "text": "a", "content": "b"}])),
        "'content': 'b'}: several fields have its text, and differ; leave all but one out",
    ),
    "a completion repeats the prompt": (
        {"prompt": "u", "completion": [USER, ANSWER]},
        "turn 2 is user's, expected assistant's",
    ),
    "a flag of many": (turns(answer(loss_mask=[0, 1])), "messages[1].loss_mask is [0, 1]; allowed: true"),
    "nothing trained": (turns(answer(train=False)), "no assistant turn to train on"),
    "an unknown role": (said(("human", "u"), ("critic", "a")), "data.roles"),
    "arguments that are no JSON": (
        turns(answer(tool_calls=[{"function": {"name": "add", "arguments": "x=1"}}])),
        "messages[1].tool_calls: arguments is 'x=1', which is not JSON",
    ),
    "arguments that are no object": (
        turns(answer(tool_calls=[{"function": {"name": "add", "arguments": "[1]"}}])),
        "arguments of 'add' must be an object: [1]",
    ),
    "a call without a name": (
        turns(answer(tool_calls=[{"function": {"arguments": {"x": 1}}}])),
        "expected an object with a name",
    ),
    "a call in words": (said(("human", "u"), ("function_call", "add 1")), "which is not JSON"),
    "calls in two fields": (turns(answer(tool_calls=[CALL], function_call=CALL)), "both have values; leave one out"),
    "a user's call": ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "messages[0] has a thought or a call"),
    "a result of no call": (
        turns(answer(tool_calls=[CALL]), RESULT, {**RESULT, "tool_call_id": "z"}, ANSWER),
        "messages[3] is a result, and no call before it waits",
    ),
    "a result of a user": ({"messages": [USER, RESULT, ANSWER]}, "turn 2 is tool's, expected assistant's"),
    "a user behind a result": (
        turns(answer(tool_calls=[CALL]), RESULT, USER, ANSWER),
        "turn 4 is user's, expected tool's or",
    ),
    **{
        f"a result with {part}": (
            turns(answer(content="", tool_calls=[CALL]), {**RESULT, "content": [part, {"type": "text", "text": "a"}]}),
            reason,
        )
        for part, reason in (({"type": "audio"}, "only parts of"), ({"type": "image", "image": "x"}, "only parts of"))
    },
    "a NUL in arguments": (turns(answer(tool_calls=[call("\0")])), "contains a NUL character"),
    "a surrogate in functions": (
        turns(ANSWER, tools=[{**TOOL["function"], "description": "\ud800"}]),
        "lone surrogate",
    ),
    "functions in words": (turns(ANSWER, tools="add(x)"), "tools is 'add(x)', which is not JSON"),
    "functions of two fields": (turns(ANSWER, tools=[TOOL], functions=[BARE]), "tools and functions both have values"),
    "a function without a name": (turns(ANSWER, tools=[{"type": "function"}]), "tools has {'type': 'function'}"),
    "preferences": (
        {"prompt": "u", "chosen": "a", "rejected": "b"},
        "field 'completion' is missing or null; there are 'prompt', 'chosen', 'rejected' (data.columns gives them",
    ),
    "an answer that is not liked": (turns(ANSWER, label=False), "label is false"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name):
    row, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        convert(row, "auto")
    assert reason in str(caught.value)


# ------------------------------------------------------------------------------------------- files


def test_preferences_are_read_under_another_name_and_labels_are_kept(write, read, refused):
    rows = [{"prompt": "u", "chosen": [USER, ANSWER], "rejected": [USER, answer(content="b")]}]
    prepared = read(write("dpo.jsonl", rows), columns={"messages": "chosen"})
    (row,) = prepared.train.examples(whole=True)
    assert row.messages == (U("u"), A("a"))
    assert prepared.report.notes == ["data.train: 2 fields not in the text: 'prompt' (1 row), 'rejected' (1 row)"]
    liked = write("kto.jsonl", [turns(answer(content=str(i)), label=bool(i % 2)) for i in range(4)])
    assert "2 bad rows" in refused(liked)[0]
    assert read(liked, skip_bad=True).report.counts["bad_row"] == 2
    assert read(liked, label_field="label").train.values("label") == ["false", "true", "false", "true"]


def test_what_is_left_out_is_counted(write, read):
    """A call is a response; a last turn without an answer is dropped."""
    rows = [turns(ANSWER, USER), turns(answer(content="", tool_calls=[CALL])), turns(answer(tool_calls=[CALL]), RESULT)]
    prepared = read(write("rows.jsonl", rows))
    assert prepared.report.counts == {"unanswered": 2}
    assert "2 last turns without an answer, dropped: " in prepared.report.lines()[-1]
    assert [len(example.messages) for example in prepared.train.examples(whole=True)] == [2, 2, 2]


def test_the_options_belong_to_the_rows(write, read):
    path = write("rows.jsonl", [turns(answer(content="b"), USER, ANSWER)])
    sides = [read(path, **more).train for more in ({}, {"trained_turns": "last"}, {"roles": {"x": "user"}})]
    assert len({side.key for side in sides}) == 3
    assert [len(list(side.examples(whole=False))) for side in sides] == [2, 1, 2]
