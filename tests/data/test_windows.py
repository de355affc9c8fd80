"""Windows of a renderer of one's own, and conversations of which most turns have no room."""

import numpy as np
import pytest

from sftmix.data import encode_dataset
from sftmix.options import DataOptions
from sftmix.text import ChatTemplate
from sftmix.text.encoder import encoder_for
from sftmix.text.examples import examples_of
from sftmix.text.mask import encode_examples
from sftmix.words.errors import ContractError
from tests.components.examples import Packed

ROWS = [
    {"instruction": f"Say {i}.", "output": "so " * (i % 5) + str(i), **({"weight": 0.5} if i == 3 else {})}
    for i in range(12)
]


@pytest.fixture
def packed(small_tokenizers):
    return encoder_for(small_tokenizers["chatml"], DataOptions(), Packed(template="chatml"))


def test_conversations_may_be_packed_by_a_class_of_ones_own(write, load, read, small_tokenizers, packed):
    path = write("rows.jsonl", ROWS)
    alone = load(encoder_for(small_tokenizers["chatml"], DataOptions(template="chatml")), path).train
    data = load(packed, path, max_length=64)
    assert 1 < len(data.train) < 12
    assert data.train.packed
    assert [name for window in data.train.ids for name in window.split("+")] == alone.ids
    rest = iter(alone)
    for window in data.train:
        assert len(window.input_ids) <= 64
        weight = np.ones(len(window.input_ids)) if window.weight is None else window.weight
        for start, stop in zip(window.starts, [*window.starts[1:], len(window.input_ids)], strict=True):
            row = next(rest)
            assert window.input_ids[start:stop].tolist() == row.input_ids.tolist()
            assert window.target[start:stop].tolist() == row.target.tolist()
            assert set(weight[start:stop][row.target]) == {0.5 if row.row == 3 else 1.0}
    assert data.report.counts == {"weighted": 1}
    kept = data.train.ids[1:]
    assert encode_dataset(read(path), packed, max_length=64, keep=kept).train.ids == kept


def test_a_window_that_is_too_long_is_refused(write, load, small_tokenizers):
    class Long(Packed):
        def windows(self, examples, length):
            return super().windows(examples, 2 * length)

    encoder = encoder_for(small_tokenizers["chatml"], DataOptions(), Long(template="chatml"))
    with pytest.raises(
        ContractError, match=r"renderer Long: windows returned \d+ ids .* at most 64 \(data.max_length\)"
    ):
        load(encoder, write("rows.jsonl", ROWS), max_length=64)


# ------------------------------------------------------------------------------------- conversations of many turns


class Counting(ChatTemplate):
    """Counts the conversations that it tokenises."""

    seen = 0

    def batch(self, examples):
        Counting.seen += len(examples)
        return super().batch(examples)


LAST_TWO = "{% for m in messages[-2:] %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def long_row(count: int, questions: dict[int, str] | None = None, **answer) -> dict:
    asked = [(questions or {}).get(i, "Why?") for i in range(count)]
    pairs = [
        ({"role": "user", "content": a}, {"role": "assistant", "content": f"{i}."} | answer)
        for i, a in enumerate(asked)
    ]
    return {"messages": [turn for pair in pairs for turn in pair]}


@pytest.mark.parametrize(
    ("template", "row", "tokenised"),
    [
        ("chatml", long_row(60), 6),
        ("chatml", long_row(15), 15),
        ("chatml", long_row(40, reasoning_content="Well."), 40),
        (LAST_TWO, long_row(40), 40),
        (LAST_TWO, long_row(40, {20: "Why so? " * 40, 39: "Why not? " * 40}), 40),
    ],
    ids=["many turns", "few turns", "thoughts", "a template that leaves out turns", "and two long questions"],
)
def test_turns_without_room_are_not_tokenised(
    template, row, tokenised, write, load, read, small_tokenizers, monkeypatch
):
    """The rows, and what the report counts, are those of each turn tokenised alone."""
    monkeypatch.setattr(Counting, "seen", 0)
    if template is LAST_TWO:
        template = write("last.jinja", LAST_TWO)
    encoder = encoder_for(
        small_tokenizers["chatml"], DataOptions(), Counting(template=template), thinks="many" in str(row)
    )
    path = write("rows.jsonl", [row])
    data = load(encoder, path, max_length=150)
    seen = Counting.seen
    (conversation,) = read(path).train.read()
    examples = [*examples_of(conversation, whole=False)]
    every = [encode_examples(encoder.renderer, [example], 150)[0] for example in examples]
    assert [e.input_ids.tolist() for e in data.train] == [list(found.ids) for found in every if found.ids]
    assert data.train.ids == [e.id for e, found in zip(examples, every, strict=True) if found.ids]
    lost = sum("no_response_token" in found.reasons for found in every)
    assert data.report.counts.get("no_response_token", 0) == lost
    assert seen == tokenised
