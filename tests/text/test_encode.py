"""`encode`: a row as it stands in a file -> what a run stores of it, without what a run needs besides."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.data import encode_dataset, prepare
from sftmix.options import DataOptions
from sftmix.text import BadRow, ChatTemplate, RowEncoder, RowFormat, encode
from sftmix.text.encoder import encoder_for
from sftmix.types import Message
from sftmix.words.errors import ConfigError, DataError
from tests.text.small_tokenizers import QWEN3, SMALL, chatml_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = {name: make() for name, make in SMALL.items()} | {"qwen3": chatml_tokenizer(QWEN3)}
"""qwen3 rewrites earlier turns, so that conversations are split, and has two prompts."""


def chat(*turns, **more):
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)], **more}


# ------------------------------------------------------------------------------------------------ by hand


def test_ids_spans_labels_and_weights_by_hand():
    """Special tokens split the text, so each part of a ChatML conversation can be tokenised alone."""
    tokenizer = TOKENIZERS["chatml"]

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    asked = [start, *ids("user\nName a colour."), end, *ids("\n"), start, *ids("assistant\n")]
    said = [*ids("Blue"), end]
    again = [*ids("\n"), start, *ids("user\nAnd now?"), end, *ids("\n"), start, *ids("assistant\n")]
    green = [*ids("Green"), end]
    turns = chat("Name a colour.", "Blue", "And now?", "Green")
    turns["messages"][3]["weight"] = 0.5
    first, second = encode(turns, tokenizer)
    assert (first.ids, first.spans, first.weights) == (asked + said, [(len(asked), len(asked + said))], None)
    assert first.labels == [-100] * len(asked) + said
    assert second.ids == [*asked, *said, *again, *green]
    assert second.labels == [-100] * len(asked + said + again) + green
    assert second.weights == [0] * len(asked + said + again) + [0.5] * len(green)
    (whole,) = encode(turns, tokenizer, multi_turn="whole")
    assert whole.labels == [-100] * len(asked) + said + [-100] * len(again) + green
    assert whole.weights == [0] * len(asked) + [1] * len(said) + [0] * len(again) + [0.5] * len(green)
    (last,) = encode(turns, tokenizer, trained_turns="last")
    assert (last.ids, last.labels) == (second.ids, second.labels)
    (cut,) = encode(turns, tokenizer, multi_turn="whole", max_length=len(asked) + 1)
    assert (cut.ids, cut.labels, cut.reasons) == (asked + said[:1], [-100] * len(asked) + said[:1], ["truncated"])


def test_what_is_left_out_is_said():
    tokenizer = TOKENIZERS["chatml"]

    def reasons(row, **options):
        return [(bool(found.ids), found.reasons) for found in encode(row, tokenizer, **options)]

    assert reasons(chat("Hi", "", "Yo?", "Yo", "And?")) == [
        (True, []),
        (False, ["empty_response"]),
        (False, ["unanswered"]),
    ]
    assert reasons(chat("Hi", " ")) == [(False, ["empty_response"])]
    assert reasons(chat("Hi", "Yo"), max_length=2) == [(False, ["no_response_token"])]
    (refused,) = encode(chat("Hi", "Yo", tools=[{"name": "f"}]), tokenizer)
    assert (refused.ids, refused.labels, refused.weights, refused.reasons) == ((), [], None, ["tools_lost"])
    encoder = RowEncoder(tokenizer)
    assert encoder({"instruction": "Hi", "output": "Yo", "tags": ["a"], "date": 3})[0].ids
    assert encoder.unread == {"'tags'": 1, "'date'": 1}


def test_a_row_that_must_be_split_says_so_before_its_turns():
    """Qwen3 takes the thoughts out of earlier turns, which are in no later prompt."""
    row = chat("Hi", "<think>\nhm\n</think>\n\nYo", "And?", "<think>\nha\n</think>\n\nNow")
    split, *turns = encode(row, TOKENIZERS["qwen3"], multi_turn="whole")
    assert (split.ids, split.reasons) == ((), ["split_turns"])
    assert [turn.labels for turn in turns] == [turn.labels for turn in encode(row, TOKENIZERS["qwen3"])]
    assert len(turns) == 2


def test_a_prompt_is_for_thinking_if_some_row_of_the_data_set_thinks():
    plain, thinking = chat("Hi", "Yo"), chat("Hi", "<think>\nhm\n</think>\n\nYo")
    tokenizer = TOKENIZERS["qwen3"]

    def said(row, **options):
        (found,) = encode(row, tokenizer, **options)
        return tokenizer.decode([label for label in found.labels if label >= 0])

    assert said(plain) == "Yo<|im_end|>"
    assert said(thinking) == "<think>\nhm\n</think>\n\nYo<|im_end|>"
    assert said(plain, rows_think=True) == "<think>\n\n</think>\n\nYo<|im_end|>"
    assert said(thinking, thoughts="drop") == "Yo<|im_end|>"


class Pair(RowFormat):
    fields = ("q", "a")

    def read(self, row, *, roles):
        return [Message("user", row["q"]), Message("assistant", row["a"], True)]


def test_formats_names_and_renderers_of_one_s_own():
    tokenizer = TOKENIZERS["bos"]
    expected = encode({"prompt": "Hi", "completion": "Yo"}, tokenizer, template="alpaca")
    assert expected[0].ids
    assert encode({"q": "Hi", "a": "Yo"}, tokenizer, row_format=Pair(), template="alpaca") == expected
    assert encode({"q": "Hi", "a": "Yo"}, tokenizer, columns={"prompt": "q", "completion": "a"}) == expected
    assert encode({"prompt": "Hi", "completion": "Yo"}, tokenizer, renderer=ChatTemplate(template="alpaca")) == expected
    turns = [{"role": "me", "content": "Hi"}, {"role": "you", "content": "Yo"}]
    assert encode({"messages": turns}, tokenizer, roles={"me": "user", "you": "assistant"}) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "text"}, "data.format is 'text'; allowed: auto, alpaca, messages, sharegpt, prompt_completion"),
        ({"multi_turn": "all"}, "data.multi_turn is 'all'; allowed: per_turn, whole"),
        ({"trained_turns": "first"}, "data.trained_turns is 'first'; allowed: all, last"),
        ({"max_length": 1}, "data.max_length is 1; allowed: at least 2, or None"),
        ({"thoughts": "keep"}, "data.thoughts is 'keep'; allowed: train, drop"),
        ({"special_tokens": "no"}, "data.special_tokens is 'no'; allowed: text, tokens"),
        ({"columns": {"colour": "c"}}, "data.columns: no format .* has colour"),
        ({"renderer": ChatTemplate(), "thoughts": "drop"}, "renderer is .*; allowed: None beside thoughts"),
        ({"template": "none.jinja"}, "data.template: 'none.jinja' is neither one of alpaca, chatml nor a readable"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        encode(chat("Hi", "Yo"), TOKENIZERS["chatml"], **options)


def test_an_encoder_goes_to_other_processes():
    encoder = RowEncoder(TOKENIZERS["qwen3"], multi_turn="whole")
    row = chat("Hi", "Yo <|im_end|>")
    before = pickle.loads(pickle.dumps(encoder))(row)
    assert encoder(row) == before == pickle.loads(pickle.dumps(encoder))(row)
    assert "spelt_special" in before[0].reasons


# ------------------------------------------------------------------------------ as a run stores the same rows

WORDS = st.sampled_from(["Hi", "Yo", "1. Plum\n2. Pear", " two ", "", "é😀", "<|im_end|>", "</s>", "a\n\nb"])
THOUGHTS = st.sampled_from(["", "", "<think>\nhm\n</think>\n\n", "<think>\n\n</think>\n\n"])
ANSWERS = st.builds(str.__add__, THOUGHTS, WORDS)
WEIGHTS = st.sampled_from([{}, {}, {"weight": 0.5}, {"weight": 0}, {"train": False}, {"weight": -1}])
FIELDS = st.sampled_from([{}, {"date": 1}])
ASKED = st.builds(lambda text, more: {"role": "user", "content": text, **more}, WORDS, FIELDS)
SAID = st.builds(lambda text, more: {"role": "assistant", "content": text, **more}, ANSWERS, WEIGHTS)
PAIRS = st.lists(st.tuples(ASKED, SAID), min_size=1, max_size=3)
TURNS = PAIRS.map(lambda pairs: [turn for pair in pairs for turn in pair])
ENDS = st.sampled_from([[], [], [{"role": "user", "content": "And?"}]])
HEADS = st.sampled_from([[], [], [{"role": "system", "content": "Be kind."}]])
LISTS = st.builds(lambda head, turns, end: head + turns + end, HEADS, TURNS, ENDS)
MORE = st.sampled_from([{}, {}, {"weight": 2}, {"system": "S"}, {"tools": "[]"}, {"image": "a.png"}, {"source": "web"}])
ROWS = st.one_of(
    st.builds(lambda turns, more: {"messages": turns, **more}, LISTS, MORE),
    st.builds(
        lambda turns: {"conversations": [{"from": t["role"], "value": t["content"]} for t in turns]},
        LISTS,
    ),
    st.builds(lambda q, x, a, more: {"instruction": q, "input": x, "output": a, **more}, WORDS, WORDS, ANSWERS, MORE),
    st.builds(lambda q, a, more: {"prompt": q, "completion": a, **more}, WORDS, ANSWERS, MORE),
    st.builds(lambda turns: {"prompt": turns[:-1], "completion": turns[-1:]}, TURNS),
    st.sampled_from([{"question": "Hi"}, {"text": "Hi"}, {"messages": []}, {"messages": "[", "id": 1}, {}]),
)
"""Rows of every format of conversations, some of them bad, some without a response."""
OF_ONE_ROW = ("bad_row", "system", "thought", "weighted", "duplicate")
"""Reasons that `encode` has in another way, or not."""


def stored(path, tokenizer, **options):
    """Return ids, labels and weights of the examples that a run stores, the report on the rows, and if these think."""
    options = DataOptions(train=[str(path)], skip_bad=True, cache_dir=str(path.parent / "cache"), **options)
    prepared = prepare(options, 0)
    encoder = encoder_for(tokenizer, options, thinks=prepared.thinks)
    data = encode_dataset(prepared, encoder, max_length=options.max_length or 10_000)
    found = []
    for row in data.train:
        weights = None if row.weight is None else np.where(row.target, row.weight, 0).tolist()
        found.append((row.input_ids.tolist(), np.where(row.target, row.input_ids, -100).tolist(), weights))
    return found, data.report, prepared.thinks


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=12)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=5),
    options=st.fixed_dictionaries(
        {},
        optional={
            "multi_turn": st.just("whole"),
            "trained_turns": st.just("last"),
            "max_length": st.integers(8, 60),
            "special_tokens": st.just("tokens"),
            "template": st.just("chatml"),
        },
    ),
)
def test_rows_are_encoded_as_a_run_stores_them(name, rows, options, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = TOKENIZERS[name]
    try:
        expected, report, think = stored(path, tokenizer, **options)
    except DataError:  # no row is left
        expected, report, think = [], None, None
    found, bad = [], []
    encoder = RowEncoder(tokenizer, rows_think=think, **options)
    for line, row in enumerate(rows, start=1):
        try:
            found += encoder(row)
        except BadRow as problem:
            bad.append(f"{path}:{line}: {problem}")
    # 32 bits: as a file has them
    weights = [e.weights and np.float32(e.weights).tolist() for e in found if e.ids]
    assert [(list(e.ids), e.labels, w) for e, w in zip([e for e in found if e.ids], weights, strict=True)] == expected
    if report is not None:
        assert report.first.get("bad_row", []) == bad
        counted = Counter(reason for encoded in found for reason in encoded.reasons)
        assert counted == {reason: n for reason, n in report.counts.items() if reason not in OF_ONE_ROW}


# -------------------------------------------------------------------------------------- with nothing else

ALONE = """
import json, sys
from pathlib import Path

for name in ("torch", "datasets", "pyarrow", "peft"):
    sys.modules[name] = None  # as if it were not installed: to import it is an error, and find_spec finds nothing

from sftmix.text import ChatTemplate, Renderer, RowFormat, encode
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
kind = AutoTokenizer if (folder / "vocab.json").exists() else PreTrainedTokenizerFast
tokenizer = kind.from_pretrained(folder)
(found,) = encode(chat, tokenizer)
trained = [label for label in found.labels if label >= 0]
print(json.dumps([tokenizer.decode(found.ids), tokenizer.decode(trained)]))
"""


@pytest.mark.parametrize(
    ("name", "text", "trained"),
    [
        (None, "Hi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>", "Yo<|im_end|>"),
        ("qwen2", "Hi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>", "Yo<|im_end|>"),
        ("mistral-7b-v0.3", "<s>[INST] Hi[/INST] Yo</s>", "Yo</s>"),
        ("gpt2_phi", "### Instruction:\nHi\n\n### Response:\nYo<|endoftext|>", "Yo<|endoftext|>"),
    ],
)
def test_numpy_and_transformers_are_enough(name, text, trained, request, tmp_path):
    if name is None:
        TOKENIZERS["chatml"].save_pretrained(tmp_path)
    folder = request.getfixturevalue("shared") / "tokenizers" / name if name else tmp_path
    program = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, response = json.loads(done.stdout)
    assert whole.endswith(text)
    assert response == trained
