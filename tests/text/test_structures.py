"""Templates of every structure that real ones have: what is trained is what the model will be asked to write.

Each template is written for one structure, with the text that is to be trained behind its prompt, by hand.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from sftmix.text.mask import encode_examples
from sftmix.types import Example, Message
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.text.small_tokenizers import chatml_tokenizer, make_encoder, metaspace_tokenizer

TURNS = """{% for m in messages %}<|im_start|>{{ m.role }}
SAID<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
PROMPT{% endif %}"""
ANSWERED = "{% if m.role == 'assistant' %}ANSWER{% else %}{{ m.content }}{% endif %}"
LAST_HALF = "{{ m.content.split('</think>')[-1].lstrip() }}"


def chatml(answer: str = "{{ m.content }}", prompt: str = "") -> str:
    return TURNS.replace("SAID", ANSWERED.replace("ANSWER", answer)).replace("PROMPT", prompt)


class Structure(NamedTuple):
    """A template, and the text that is trained for a thought ("" for none) and an answer."""

    template: str
    trained: Callable[[str, str], str]
    system: bool = True
    thinks: bool = True


def in_front(thought: str, answer: str) -> str:
    """What follows a prompt that opens nothing."""
    return (f"<think>\n{thought}\n</think>\n\n" if thought else "") + answer + "<|im_end|>"


FIELD = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
SPACE = "{% if m.role == 'assistant' %}    {% endif %}"
STRUCTURES = {
    "opens": Structure(
        chatml(LAST_HALF, "<think>\n"), lambda thought, answer: f"{thought}\n</think>\n\n{answer}<|im_end|>"
    ),
    "opens_and_writes_it": Structure(
        chatml("<think>\n{{ m.reasoning_content }}\n</think>\n{{ m.content }}", "<think>\n"),
        lambda thought, answer: f"{thought}\n</think>\n{answer}<|im_end|>",
    ),
    "closes": Structure(chatml("{{ m.content }}", "<think></think>"), in_front, thinks=False),
    "strips": Structure(chatml(LAST_HALF), in_front),
    "field": Structure(chatml(FIELD), in_front),
    "content": Structure(chatml(), in_front),
    "prose": Structure("<|im_start|>system\nWrite <think> thoughts </think> first.<|im_end|>\n" + chatml(), in_front),
    "appends_eos": Structure(
        chatml().replace("<|im_end|>", ""),
        lambda thought, answer: in_front(thought, answer)[: -len("<|im_end|>")] + "<|end|>",
    ),
    "ends_before_the_next": Structure(  # as vLLM's ChatML: eos is put behind the last turn
        chatml(FIELD).replace(
            "<|im_end|>\n{% endfor", "{% if not loop.last or m.role != 'assistant' %}<|im_end|>\n{% endif %}{% endfor"
        ),
        lambda thought, answer: in_front(thought, answer)[: -len("<|im_end|>")] + "<|end|>",
    ),
    "no_system": Structure(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + chatml(FIELD), in_front, False
    ),
    "parts": Structure(chatml(FIELD).replace("m.content", "m.content[0].text"), in_front),
    "header_behind_more_space": Structure(chatml(FIELD).replace("<|im_start|>{{", SPACE + "<|im_start|>{{"), in_front),
    "header_behind_less_space": Structure(chatml(FIELD).replace("<|im_start|>a", "\n  <|im_start|>a"), in_front),
    "header_in_words": Structure(
        chatml(FIELD)
        .replace("<|im_start|>{{ m.role }}", SPACE + "### {{ m.role }} says:")
        .replace("<|im_start|>assistant", " ### assistant  says:\n"),
        in_front,
    ),
}
WORDS = st.text("abc déø.,!?1\n", min_size=1, max_size=12).map(str.strip).filter(bool)
EXCHANGE = st.tuples(WORDS, st.one_of(st.just(""), WORDS), WORDS, st.booleans())


@cache
def tokenizer_of(kind: str, template: str):
    tokenizer = {"chatml": chatml_tokenizer, "metaspace": metaspace_tokenizer}[kind]()
    tags = ["<think>", "</think>"]
    marks = ["<|im_start|>", "<|im_end|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = template
    return tokenizer


@cache
def encoder_of(kind: str, structure: str, thinks: bool):
    return make_encoder(tokenizer_of(kind, STRUCTURES[structure].template), thinks=thinks)


@pytest.mark.parametrize("structure", some_fast(STRUCTURES, every=2))
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["chatml", "metaspace"]), exchanges=st.lists(EXCHANGE, min_size=1, max_size=3), system=WORDS
)
def test_what_follows_the_served_prompt_is_trained(structure, kind, exchanges, system):
    known = STRUCTURES[structure]
    exchanges = [(asked, thought * known.thinks, *rest) for asked, thought, *rest in exchanges]
    thinks = any(thought for _, thought, *_ in exchanges)
    encoder = encoder_of(kind, structure, thinks)
    tokenizer = encoder.tokenizer
    messages = [Message("system", system)] if known.system else []
    for question, thought, answer, in_content in exchanges:
        content = f"<think>\n{thought}\n</think>\n\n{answer}" if thought and in_content else answer
        messages += [
            Message("user", question),
            Message("assistant", content, thought="" if in_content else thought),
        ]
        *before, last = messages
        last = Message("assistant", last.content, True, thought=last.thought)
        (found,) = encode_examples(encoder.renderer, [Example("x", (*before, last))], 10_000)
        served = tokenizer.apply_chat_template(
            [encoder.renderer.turn(turn) for turn in before],
            chat_template=encoder.chat_template,
            add_generation_prompt=True,
            return_dict=False,
        )
        if structure == "parts":
            served = encoder.renderer.prompt(before)
        ((start, end),) = found.spans
        assert found.ids[:start] == served
        assert end == len(found.ids)
        assert tokenizer.decode(found.ids[start:]).lstrip() == known.trained(thought, answer).lstrip()
        assert found.ids[-1] == encoder.stop_ids[0]
        text = encoder.decode(found.ids)
        for tag in ("<think>", "</think>", "<|im_start|>", "<|im_end|>"):
            assert found.ids.count(tokenizer.convert_tokens_to_ids(tag)) == text.count(tag)


# DeepSeek-V3.1 as vLLM writes it: the prompt is "\n  <|Assistant|>    </think>", the rendering has other white space.
CLOSED = chatml("    </think>      {{ m.content }}", "      </think>").replace("<|im_start|>a", "\n  <|im_start|>a")
OWN_WORDS = ("user", "assistant", "t", "n", "a", ">", "|", "think", "im", "says", "Four.")


@pytest.mark.parametrize(
    "template", [*(one.template for one in STRUCTURES.values()), CLOSED], ids=[*STRUCTURES, "closed"]
)
@pytest.mark.parametrize("thought", ["", "Two and two."])
def test_a_question_of_the_templates_own_words_is_one_as_others(template, thought):
    """It is found by its place, and not by what it says."""
    if thought and template in (CLOSED, STRUCTURES["closes"].template):
        return
    encoder = make_encoder(tokenizer_of("chatml", template), thinks=bool(thought))
    trained = set[tuple[str, ...]]()
    for question in ("Which fish?", *OWN_WORDS):
        chat = Message("user", question), Message("assistant", "Four.", True, thought=thought)
        (found,) = encode_examples(encoder.renderer, [Example("x", chat)], 10_000)
        trained.add((encoder.decode(found.ids[found.spans[0][0] :]), *(set(found.reasons) & {"composed"})))
    assert len(trained) == 1


def test_a_prompt_that_closes_the_thought_of_the_rows_is_refused():
    """A thought behind it would be trained where no model is asked for one."""
    tokenizer = tokenizer_of("chatml", STRUCTURES["closes"].template)
    with pytest.raises(ConfigError, match=r"closes the thought .*\(data\.thoughts drop\), or choose a template"):
        make_encoder(tokenizer, thinks=True)
    assert make_encoder(tokenizer, thinks=True, thoughts="drop").chat_template == tokenizer.chat_template


def test_generation_tags_mark_the_same_tokens():
    """Of a template that has them, transformers' own mask is ours."""
    template = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}<think>
{{ m.reasoning_content }}
</think>

{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
    tokenizer = tokenizer_of("chatml", template)
    for thought in ("", "2 + 2"):
        encoder = make_encoder(tokenizer, thinks=bool(thought))
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "reasoning_content": thought}]
        (found,) = encode_examples(
            encoder.renderer,
            [Example("x", (Message("user", "Hi"), Message("assistant", "Yo", True, thought=thought)))],
            1000,
        )
        theirs = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ((start, end),) = found.spans
        mask = [0] * start + [1] * (end - start)
        assert theirs["input_ids"][: len(found.ids)] == found.ids
        assert theirs["assistant_masks"] == mask + [0] * (len(theirs["input_ids"]) - len(mask))


def encoded(encoder, *messages: Message, **more):
    """What becomes of a conversation: its text, the trained texts with their weights, and the reasons."""
    (found,) = encode_examples(encoder.renderer, [Example("x", messages, **more)], 10_000)
    texts = [encoder.decode(found.ids[a:b]) for a, b in found.spans]
    return encoder.decode(found.ids), [*zip(texts, found.span_weights, strict=True)], found.reasons


@pytest.mark.parametrize("structure", ["field", "content", "strips", "opens"])
@pytest.mark.parametrize("in_content", [False, True])
def test_thoughts_are_left_out(structure, in_content):
    tokenizer = tokenizer_of("chatml", STRUCTURES[structure].template)
    content = "<think>\n2 + 2\n</think>\n\nFour." if in_content else "Four."
    chat = Message("user", "Hi"), Message("assistant", content, True, thought="" if in_content else "2 + 2")
    text, spans, _ = encoded(make_encoder(tokenizer, thoughts="drop"), *chat)
    assert "2 + 2" not in text
    assert spans[-1][0].endswith("Four.<|im_end|>")


def test_parts_of_a_turn_have_weights_of_their_own():
    encoder = encoder_of("chatml", "content", False)
    said = Message("assistant", "Blue and green.", True, 2.0, parts=(("Blue", 1.0), (" and", 0.0), (" green.", 0.5)))
    _, spans, _ = encoded(encoder, Message("user", "Hi"), said)
    assert spans == [("Blue", 2.0), (" green.<|im_end|>", 1.0)]


def test_parts_are_found_in_json_or_the_example_is_lost():
    """A template that writes the answer as JSON: it is found there if it needs no escapes."""
    encoder = make_encoder(tokenizer_of("chatml", chatml(FIELD.replace("{{ m.content }}", "{{ m.content | tojson }}"))))
    halves = Message("assistant", "Wrong. Four.", True, parts=(("Wrong. ", 0.0), ("Four.", 1.0)))
    assert encoded(encoder, Message("user", "Hi"), halves)[1:] == ([('Four."<|im_end|>', 1.0)], [])
    escaped = replace(halves, content='Wrong."\n Four."\n', parts=[('Wrong."\n ', 0.0), ('Four."\n', 1.0)])
    assert encoded(encoder, Message("user", "Hi"), escaped)[1:] == ([], ["template_refused"])
    ((text, _),) = encoded(encoder, Message("user", "Hi"), replace(escaped, parts=()))[1]
    assert json.loads(text.partition("<")[0]) == escaped.content


EACH_CALL = """{% for call in m.tool_calls %}{% set c = call.function %}
{{- '<tool_call>' + c.name + ' ' + (c.arguments | tojson) + '</tool_call>' }}{% endfor %}"""
CALLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + chatml(FIELD + EACH_CALL)
TOOL = {"type": "function", "function": {"name": "weather", "description": "Say it.", "parameters": {}}}
CALL = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_calls_are_trained_and_results_are_not():
    encoder = make_encoder(tokenizer_of("chatml", CALLS))
    asked = Message("user", "Is it warm?")
    call = Message("assistant", "", True, more={"tool_calls": [CALL]})
    result = Message("tool", "21 degrees", more={"tool_call_id": "call00000"})
    text, spans, reasons = encoded(encoder, asked, call, result, Message("assistant", "Yes.", True), tools=(TOOL,))
    assert spans == [('<tool_call>weather {"city": "Oslo"}</tool_call><|im_end|>', 1.0), ("Yes.<|im_end|>", 1.0)]
    assert '"name": "weather"' in text.partition("<|im_end|>")[0]
    assert "<|im_start|>tool\n21 degrees<|im_end|>" in text
    assert reasons == []


BY_ARGUMENT = """{% for call in m.tool_calls %}{% set c = call.function %}<tool_call>{{ c.name }}
{% for name, value in c.arguments | items %}<parameter={{ name }}>{{ (value | tojson) if value is mapping or
(value is sequence and value is not string) else (value | string) }}</parameter>{% endfor %}</tool_call>{% endfor %}"""
"""As of Qwen3-Coder and Nemotron: a value that is no list or object is written as Python does."""
PLAIN_VALUES = [True, False, None, 3, 2.5, 1e22, -0.0, "true", 'a "b"\n', "é", [True, None], {"deep": {"x": [None]}}]


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=repr)
@pytest.mark.parametrize("form", [EACH_CALL, BY_ARGUMENT, BY_ARGUMENT.replace("tojson", "string")])
def test_a_call_has_values_as_json_or_python_spells_them(form, value):
    encoder = make_encoder(tokenizer_of("chatml", CALLS.replace(EACH_CALL, form)))
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": value}}}
    _, spans, reasons = encoded(
        encoder, Message("user", "Hi"), Message("assistant", "", True, more={"tool_calls": [call]}), tools=(TOOL,)
    )
    assert reasons == []
    assert str(value) in spans[0][0] or json.dumps(value, ensure_ascii=False) in spans[0][0]


@pytest.mark.parametrize("value", [True, None, "true", 12])
def test_a_call_whose_value_is_not_written_is_lost(value):
    encoder = make_encoder(
        tokenizer_of("chatml", CALLS.replace(EACH_CALL, BY_ARGUMENT.replace("(value | string)", "'noon'")))
    )
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": value}}}
    _, _, reasons = encoded(
        encoder, Message("user", "Hi"), Message("assistant", "", True, more={"tool_calls": [call]}), tools=(TOOL,)
    )
    assert reasons == ["calls_lost"]


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reason"),
    [
        (chatml(), [("assistant", "", {"tool_calls": [CALL]})], (TOOL,), "tools_lost"),
        (chatml(), [("assistant", "", {"tool_calls": [CALL]})], (), "calls_lost"),
        (
            CALLS.replace("{% else %}{{ m.content }}", "{% elif m.role == 'user' %}{{ m.content }}"),
            [("assistant", "", {"tool_calls": [CALL]}), ("tool", "21 degrees", {}), ("assistant", "Yes", {})],
            (TOOL,),
            "tools_lost",
        ),
    ],
)
def test_what_a_template_cannot_write_is_named(template, messages, tools, reason):
    encoder = make_encoder(tokenizer_of("chatml", template))
    turns = [Message(role, text, role == "assistant", more=more) for role, text, more in messages]
    assert encoded(encoder, Message("user", "Hi"), *turns, tools=tools)[2] == [reason]


def test_parts_beside_calls_are_refused():
    """Which of the template's words are theirs is not known there."""
    halves = Message(
        "assistant", "Wrong. Four.", True, more={"tool_calls": [CALL]}, parts=(("Wrong. ", 0.0), ("Four.", 1.0))
    )
    encoder = make_encoder(tokenizer_of("chatml", CALLS))
    assert encoded(encoder, Message("user", "Hi"), halves, tools=(TOOL,))[1:] == ([], ["template_refused"])


BESIDE_CALLS = """{% if m.reasoning_content and m.tool_calls %}<|channel>thought
{{ m.reasoning_content }}
<channel|>{% endif %}{{ m.content.split('<channel|>')[-1] }}"""
"""As Gemma 4, which also deletes thoughts from contents."""


@pytest.mark.parametrize("in_call", [False, True])
def test_a_thought_is_in_the_tags_that_the_template_writes_beside_a_call(in_call):
    encoder = make_encoder(tokenizer_of("chatml", CALLS.replace(FIELD, BESIDE_CALLS)), thinks=True)
    more = {"tool_calls": [CALL]} if in_call else {}
    said = "" if in_call else "Four."
    for answer in (
        Message("assistant", said, True, thought="2 + 2", more=more),
        Message("assistant", f"<|channel>thought\n2 + 2\n<channel|>{said}", True, more=more),
    ):
        _, ((text, _),), _ = encoded(encoder, Message("user", "Hi"), answer, tools=(TOOL,))
        rest = '<tool_call>weather {"city": "Oslo"}</tool_call>' if in_call else "Four."
        assert text == f"<|channel>thought\n2 + 2\n<channel|>{rest}<|im_end|>"


ASKED = Message("user", "Is it warm?")
CALLED = Message("assistant", "", True, more={"tool_calls": [CALL]})
ANSWERED_BY = (Message("tool", "21 degrees", more={"tool_call_id": "call00000"}), Message("assistant", "Yes.", True))


def test_a_call_behind_a_token_that_ends_a_turn_is_lost():
    """A model would stop there. As GigaChat 3, where it is eos."""
    template = CALLS.replace("<|im_end|>", "<|end|>").replace("{{- '<tool_call>'", "{{- '<|end|>\n<tool_call>'")
    encoder = make_encoder(tokenizer_of("chatml", template))
    assert encoded(encoder, ASKED, CALLED, tools=(TOOL,))[1:] == ([], ["calls_lost"])


def test_an_earlier_call_that_the_template_leaves_out_is_lost():
    """Its result would be answered out of nothing."""
    template = CALLS.replace(EACH_CALL, "{% if loop.last %}" + EACH_CALL + "{% endif %}")
    encoder = make_encoder(tokenizer_of("chatml", template))
    earlier = replace(CALLED, trained=False)
    assert encoded(encoder, ASKED, earlier, *ANSWERED_BY, tools=(TOOL,))[1:] == ([], ["calls_lost"])
    assert encoded(encoder, ASKED, CALLED, tools=(TOOL,))[2] == []


def test_arguments_as_text_without_a_list_of_functions():
    """As DeepSeek-R1, which adds them to a text and lists no functions."""
    as_text = EACH_CALL.replace("(c.arguments | tojson)", "c.arguments")
    encoder = make_encoder(tokenizer_of("chatml", chatml(FIELD + as_text)))
    assert encoded(encoder, ASKED, CALLED)[1:] == (
        [('<tool_call>weather {"city": "Oslo"}</tool_call><|im_end|>', 1.0)],
        [],
    )


def test_a_turn_that_a_template_ends_twice_is_ended_once():
    """As Apriel 1.5 behind the last turn."""
    encoder = make_encoder(
        tokenizer_of("chatml", chatml() + "{% if messages[-1].role != 'user' %}<|im_end|>\n{% endif %}")
    )
    assert encoded(encoder, ASKED, Message("assistant", "Yes.", True))[1:] == ([("Yes.<|im_end|>", 1.0)], [])
