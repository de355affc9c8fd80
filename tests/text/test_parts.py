"""Parts of a response: those with weights of their own, its thought, its answer, each in the tokens that say it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.text.mask import encode_examples
from sftmix.text.values import BadRow
from tests.fast import some_fast
from tests.text.converted import convert
from tests.text.small_tokenizers import (
    QWEN3,
    QWEN3_THINKING,
    bos_tokenizer,
    chatml_tokenizer,
    make_encoder,
    metaspace_tokenizer,
)

OFF = {"train": False}
EMPTY = "<think>\n\n</think>\n\n"
OLD_R1 = """{%- for m in messages %}{%- if m.role == 'assistant' %}<|im_start|>assistant
{{ m.content.split('</think>')[-1] }}<|im_end|>{%- else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
"""As of DeepSeek's distilled models: the prompt opens a thought, and turns are written without theirs."""


def row(content: object, **fields: object) -> dict:
    """A row of one question; pairs of (text, fields) are parts of the content."""
    if isinstance(content, list):
        content = [{"type": "text", "text": text, **more} for text, more in content]
    return {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": content, **fields}]}


def weighed(encoder, given: dict):
    """The decoded tokens of the row with their weights, and the reasons that are counted."""
    (found,) = encode_examples(encoder.renderer, [convert(given, "auto", source="s")], 2000)
    weight = np.zeros(len(found.ids))
    for (start, end), of_span in zip(found.spans, found.span_weights, strict=True):
        weight[start:end] = of_span
    return found.ids, weight, found.reasons


def trained_text(encoder, given: dict) -> str:
    """The text of the trained tokens, in order."""
    ids, weight, _ = weighed(encoder, given)
    return encoder.decode([token for token, of_token in zip(ids, weight, strict=True) if of_token])


# ----------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("\n\n1. Plum", OFF), (" 2. Pear", {})], " 2. Pear</s>"),
        ([("\n\n1. Plum", {}), (" 2. Pear", OFF)], "\n\n1. Plum"),
        ([("1. Plum", OFF), (" 2. Pear", {})], " 2. Pear</s>"),
    ],
)
def test_parts_of_a_response_that_is_tokenised_apart_from_its_prompt(parts, expected):
    """As its first newlines would be one token with the prompt's."""
    encoder = make_encoder(bos_tokenizer())
    assert trained_text(encoder, row(parts)) == expected
    assert ("boundary" in weighed(encoder, row(parts))[2]) == parts[0][0].startswith("\n\n")


@pytest.mark.parametrize("tokenizer", [chatml_tokenizer, bos_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("said", ["🎉", "東京", "👩‍👩‍👧", "ñ 🇫🇷 ☃️", "\ufffd🎉"])
@pytest.mark.parametrize("space", ["", "\n\n", "  "])
def test_parts_with_characters_of_several_tokens(tokenizer, said, space):
    """The first of these tokens are decoded as U+FFFD, which the text does not have there."""
    encoder = make_encoder(tokenizer())
    end = encoder.decode(list(encoder.stop_ids[:1]))
    first, second = f"{space}Wrong {said}: no!", f" Right {said}."
    assert trained_text(encoder, row([(first, OFF), (second, {})])).strip() == f"{second}{end}".strip()
    assert trained_text(encoder, row([(first, {}), (second, OFF)])).strip() == first.strip()


WORDS = st.sampled_from(["Blue", "s", " lead", "trail ", "end", "a.b", "é", "1", "e"])
PARTS = st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=3).map("".join), st.sampled_from([0.25, 0.5, 2.0])))


@pytest.mark.parametrize("tokenizer", some_fast([chatml_tokenizer, bos_tokenizer, metaspace_tokenizer], every=3))
@settings(deadline=None)
@given(parts=PARTS.filter(lambda parts: len({weight for _, weight in parts}) > 1))
def test_each_token_has_the_weight_of_the_last_part_that_it_says(tokenizer, parts):
    encoder = make_encoder(tokenizer())
    ids, weight, reasons = weighed(encoder, row([(text, {"weight": share}) for text, share in parts]))
    answer = "".join(text for text, _ in parts)
    shares = [share for text, share in parts for _ in text]
    whole = encoder.decode(ids)
    begin = whole.rindex(answer.strip()) - (len(answer) - len(answer.lstrip()))
    last = begin + len(answer.rstrip())
    before = 0
    for count, of_token in enumerate(weight, start=1):
        text = encoder.decode(ids[:count])
        said = [shares[at - begin] for at in range(before, len(text)) if begin <= at < last]
        if said and "\ufffd" not in text[-3:]:
            assert of_token == said[-1], (text, reasons)
        before = len(text)


# ------------------------------------------------------------------------------------------ thoughts and parts


def test_a_thought_in_front_of_parts_has_the_weight_of_its_turn():
    parts = [("Let me guess: five.", OFF), (" It is four.", {})]
    thought = make_encoder(chatml_tokenizer(QWEN3), thinks=True)
    assert (
        trained_text(thought, row(parts, reasoning_content="2+2")) == "<think>\n2+2\n</think>\n\n It is four.<|im_end|>"
    )
    halves = [("Five. ", {"weight": 0.5}), ("Four.", {})]
    ids, weight, _ = weighed(thought, row(halves, reasoning_content="2+2", weight=3))
    assert thought.decode([token for token, share in zip(ids, weight, strict=True) if share == 1.5]) == "Five. "
    assert thought.decode([token for token, share in zip(ids, weight, strict=True) if share == 3]) == (
        "<think>\n2+2\n</think>\n\nFour.<|im_end|>"
    )


@pytest.mark.parametrize("thought", ["<think>2+2</think>", EMPTY])
def test_a_thought_inside_parts_is_refused(thought):
    with pytest.raises(BadRow, match="put it into reasoning_content"):
        convert(row([(f"{thought}Wrong. ", OFF), ("Right.", {})]), "auto")


# --------------------------------------------------------------------------------------------- empty thoughts


@pytest.mark.parametrize("thoughts", ["train", "drop"])
@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("template", [QWEN3, QWEN3_THINKING, OLD_R1])
def test_an_empty_thought_is_written_once(template, thinks, thoughts):
    """As Qwen3 answers under /no_think: the text is that of a row without it."""
    encoder = make_encoder(chatml_tokenizer(template), thinks=thinks, thoughts=thoughts)
    assert weighed(encoder, row(f"{EMPTY}Four."))[0] == weighed(encoder, row("Four."))[0]
    assert encoder.decode(weighed(encoder, row(f"{EMPTY}Four."))[0]).count("</think>") == 1


@pytest.mark.parametrize(("thoughts", "expected"), [("train", f"{EMPTY}Four.<|im_end|>"), ("drop", "Four.<|im_end|>")])
def test_an_empty_thought_under_a_template_without_thoughts_is_as_the_row_has_it(thoughts, expected):
    assert trained_text(make_encoder(chatml_tokenizer(), thoughts=thoughts), row(f"{EMPTY}Four.")) == expected


@pytest.mark.parametrize("thoughts", ["train", "drop"])
def test_a_thought_without_an_answer_is_an_empty_response(thoughts, small_tokenizers, load, write):
    """In a field or in the content alike; the turn of a conversation is left out alone."""
    rows = [row("<think>only</think>"), row("", reasoning_content="only"), row(EMPTY), row("<think>a</think>Four.")]
    rows.append({"messages": [*rows[0]["messages"], *row("Last.")["messages"]]})
    encoder = make_encoder(small_tokenizers["chatml"], thinks=True, thoughts=thoughts)
    data = load(encoder, write("rows.jsonl", rows), thoughts=thoughts, max_length=200)
    assert data.report.counts["empty_response"] == 4
    endings = [encoder.decode(example.input_ids[example.target]) for example in data.train]
    assert [text[-15:] for text in endings] == ["Four.<|im_end|>", "Last.<|im_end|>"]


# -------------------------------------------------------------------------------------------- fields of rows


def test_a_label_may_be_in_a_field_that_is_read_as_nothing_else(write, read):
    rows = [{"prompt": "a", "completion": "b", "weight": "high"}, {"prompt": "c", "completion": "d", "weight": "low"}]
    rows.append({"prompt": "e", "completion": "f"})
    side = read(write("rows.jsonl", rows), columns={"weight": None}, label_field="weight").train
    assert side.values("label") == ["high", "low", None]
    assert {message.weight for example in side.examples(whole=True) for message in example.messages} == {1.0}


def test_a_field_that_is_not_read_is_not_read_under_its_other_name(write, read):
    rows = [{"prompt": "a", "completion": "b", "loss_weight": 0.5, "functions": "none of ours"}]
    (example,) = read(write("rows.jsonl", rows), columns={"weight": None, "tools": None}).train.examples(whole=True)
    assert (example.messages[-1].weight, example.tools) == (1.0, ())


def test_characters_beyond_the_basic_plane_in_a_template(small_tokenizers):
    """As a value of its variables, and in its header."""
    template = "{% for m in messages %}{{ m.role }} {{ face }}🤖 {{ m.content }}<|im_end|>{% endfor %}"
    encoder = make_encoder(chatml_tokenizer(template), variables={"face": "😀 É"})
    assert (
        encoder.decode(weighed(encoder, row("Four."))[0]) == "user 😀 É🤖 Q?<|im_end|>assistant 😀 É🤖 Four.<|im_end|>"
    )


def test_a_file_whose_name_is_no_utf8(tmp_path, refused):
    (tmp_path / "rows").mkdir()
    try:
        (tmp_path / "rows" / b"r\xe9sum\xe9.jsonl".decode("utf-8", "surrogateescape")).write_text('{"text": "a"}')
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (line,) = refused(str(tmp_path / "rows"))
    assert "is not UTF-8" in line
