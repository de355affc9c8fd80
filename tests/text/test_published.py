"""Rows in the forms of published data sets: JSON in a text, a template's variables, and turns that are no turns."""

import json
from collections import Counter

import pytest

from sftmix.text.values import BadRow
from sftmix.types import Message
from tests.text.converted import convert

CHAT = [{"role": "user", "content": "u", "time": None}, {"role": "assistant", "content": "a", "source": "s"}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
MESSAGES = (Message("user", "u"), Message("assistant", "a", True))


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_turns_in_a_text(field):
    unread = Counter[str]()
    assert convert({field: json.dumps(CHAT)}, "auto", unread=unread).messages == MESSAGES
    assert unread == {f"'{field}[].source'": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "u: hello"}, "messages is 'u: hello', which is not JSON"),
        ({"messages": '{"a": 1}'}, "messages[0].from is None in {'a': 1}; known: system, "),
        (
            {"messages": [{"input": "u", "output": "a"}]},
            "messages[0].from is None in {'input': 'u', 'output': 'a'}; known: system, ",
        ),
        (
            {"conversations": ["u", "a"]},
            "conversations[0].from is None in 'u'; known: system, ",
        ),
        (
            {"messages": [{**CHAT[0], "functions": json.dumps([FUNCTION])}, CHAT[1]]},
            "messages[0] lists functions; they are the row's, in a field `tools`",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": "a", "function_calls": "f(city='Paris')"}]},
            """function_calls is "f(city='Paris')", which is not JSON""",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_a_way_on(row, reason):
    with pytest.raises(BadRow) as caught:
        convert(row, "auto")
    assert reason in str(caught.value)


TWICE = '{"content": "good", "role": "user", "content": "bad"}'
ARGUMENTS = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"messages": f'[{TWICE}, {{"role": "assistant", "content": "a"}}]'}, "messages is .* 'content'"),
        ({"messages": [CHAT[0], ARGUMENTS]}, ".*tool_calls: arguments is .* 'a'"),
        ({"messages": CHAT, "tools": '[{"name": "f", "name": "g"}]'}, "tools is .* 'name'"),
    ],
)
def test_a_key_that_is_twice_in_a_json_text_is_refused_as_in_json_lines(row, key):
    """The last value would count, without a word."""
    with pytest.raises(BadRow, match=f"^{key} is twice in one object; write it once: "):
        convert(row, "auto")


@pytest.mark.parametrize("value", [None, "", "null", [], "[]", {}, "{}", {"a": None}])
def test_no_arguments_in_any_spelling_are_an_empty_object(value):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": value}]}
    (_, found) = convert({"messages": [CHAT[0], call]}, "auto").messages
    assert [call["function"]["arguments"] for call in found.more["tool_calls"]] == [{}]


@pytest.mark.parametrize("value", [0, False, "0", "false", [1], "[1]", '"x"'])
def test_arguments_that_are_no_object_make_a_bad_row(value):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": value}]}
    with pytest.raises(BadRow, match="arguments of 'f' must be an object: "):
        convert({"messages": [CHAT[0], call]}, "auto")


@pytest.mark.parametrize(
    ("turn", "unused"),
    [
        ({"role": "user", "content": "Hi", "value": "b", "from": "human"}, {"from", "value"}),
        ({"from": "human", "value": "Hi", "content": "b"}, {"content"}),
        ({"from": "human", "value": "Hi", "content": "b", "role": None}, {"content"}),
        ({"role": "user", "content": "Hi", "value": None, "from": ""}, set()),
    ],
)
def test_the_other_spelling_of_a_turn_is_named_as_not_read(turn, unused):
    unread = Counter[str]()
    messages = convert({"messages": [turn, {"role": "assistant", "content": "a"}]}, "auto", unread=unread).messages
    assert messages[0].content == "Hi"
    assert {*unread} == {f"'messages[].{name}'" for name in unused}


def test_false_in_the_words_of_a_table_is_no_image():
    row = {"prompt": "a", "completion": "b"}
    for value in (False, "False", "false", 0, "0", 0.0):
        assert [turn.content for turn in convert({**row, "image": value}, "auto").messages] == ["a", "b"]
    for value in (True, "True", "a.png"):
        with pytest.raises(BadRow, match=r"^image is "):
            convert({**row, "image": value}, "auto")


def test_calls_of_several_functions_in_json():
    turn = {"role": "assistant", "content": None, "function_calls": json.dumps([FUNCTION["function"]])}
    (_, found) = convert({"messages": [CHAT[0], turn]}, "auto").messages
    assert [call["function"]["name"] for call in found.more["tool_calls"]] == ["f"]
