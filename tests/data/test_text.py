"""Plain text: how documents are held out, tokenised and cut into windows."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.options import DataOptions
from sftmix.text.encoder import encoder_for
from sftmix.text.windows import cut_into_windows
from sftmix.words.errors import ConfigError
from tests.text.small_tokenizers import SMALL

TALES = [f"Tale {i}.\n\n" + " ".join(f"Then {j} came {i * j}." for j in range(3 + i)) + "\n" for i in range(12)]


@pytest.fixture(scope="session")
def encoders(small_tokenizers):
    """Encoders of packed documents, and of pieces of single ones, by their tokenizers."""
    options = {None: DataOptions(format="text"), False: DataOptions(format="text", packing=False)}
    made = {
        (name, packing): encoder_for(small_tokenizers[name], options[packing])
        for name in small_tokenizers
        for packing in options
    }
    return made | {name: made[name, None] for name in small_tokenizers}


def tokens_of(encoder, text: str, *, begins: bool = True, ends: bool = True) -> list[int]:
    """A document as the tokenizer itself would write it, then eos."""
    tokenizer = encoder.tokenizer
    ids = tokenizer(text, add_special_tokens=begins)["input_ids"]
    return ids + ([tokenizer.eos_token_id] if ends else [])


def expected_windows(
    documents: list[list[int]], length: int, *, packed: bool = True
) -> list[tuple[list[int], list[int]]]:
    """(tokens, starts) of each window, from the definition: place by place."""
    groups = [documents] if packed else [[document] for document in documents]
    found = []
    for group in groups:
        marked = [(token, place == 0) for document in group for place, token in enumerate(document)]
        for at in range(0, len(marked), length):
            window = marked[at : at + length]
            found.append(([t for t, _ in window], [k for k, (_, new) in enumerate(window) if new or k == 0]))
    return [(ids, starts) for ids, starts in found if len(starts) < len(ids)]


# ---------------------------------------------------------------------------------------------- windows


@given(
    st.lists(st.integers(1, 12).flatmap(lambda n: st.lists(st.integers(0, 50), min_size=n, max_size=n)), min_size=1),
    st.integers(2, 9),
)
def test_windows_hold_every_token_of_every_document_once(documents, length):
    found = list(cut_into_windows(enumerate(documents), length, True))
    assert [(ids, starts) for *_, ids, starts in found if len(starts) < len(ids)] == expected_windows(documents, length)
    assert [token for *_, ids, _ in found for token in ids] == [token for ids in documents for token in ids]
    assert all(len(ids) == length for *_, ids, _ in found[:-1])
    owners = [number for number, ids in enumerate(documents) for _ in ids]
    assert [number for number, *_ in found] == owners[::length]


def test_the_id_of_a_window_is_what_it_holds(write, load, small_tokenizers):
    """Its tokens and where documents begin; `#k` for the k-th repetition."""

    def names(*texts, length=1000, **more) -> list[str]:
        path = write("echo.jsonl", [{"text": text} for text in texts])
        encoder = encoder_for(small_tokenizers["chatml"], DataOptions(format="text", **more))
        return load(encoder, path, **more, format="text", max_length=length).train.ids

    (one, *rest) = names(*[TALES[0]] * 3, packing=False)
    assert rest == [f"{one}#1", f"{one}#2"]
    assert names(TALES[0]) == [one]
    assert len({*names("ab", "c"), *names("ab<|end|>c", special_tokens="tokens")}) == 2  # the same tokens


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("packing", [None, False])
def test_documents_become_windows(kind, packing, write, load, encoders):
    encoder = encoders[kind, packing]
    path = write("tales.jsonl", [{"text": tale, "score": i} for i, tale in enumerate(TALES)])
    label = None if packing is None else "score"
    data = load(encoder, path, format="text", packing=packing, label_field=label, max_length=30)
    expected = expected_windows([tokens_of(encoder, tale) for tale in TALES], 30, packed=packing is None)
    assert [(e.input_ids.tolist(), e.starts.tolist()) for e in data.train] == expected
    assert data.train.example(0).messages[0].content == encoder.decode(expected[0][0])
    for encoded in data.train:
        assert np.flatnonzero(~encoded.target).tolist() == encoded.starts.tolist()
    assert data.train.packed is (packing is None)
    if label:
        assert data.train.labels == [data.train.example(row).label for row in range(len(data.train))]
        assert set(data.train.labels) == {str(i) for i in range(12)}
    assert any(line.startswith("12 documents read") for line in data.report.lines())
    assert data.report.tokens == (sum(len(ids) for ids, _ in expected), 0)


@pytest.mark.slow
def test_a_novel_is_what_the_tokenizer_makes_of_it(tokenizer, shared, load):
    path = shared / "data/text/Doyle_Hound_1902.txt"
    encoder = encoder_for(tokenizer, DataOptions(format="text"))
    data = load(encoder, str(path), max_length=5000)
    expected = tokens_of(encoder, path.read_text(encoding="utf-8-sig"))
    assert [token for window in data.train for token in window.input_ids.tolist()] == expected


def test_a_tokenizer_without_eos_is_refused(small_tokenizers):
    without_eos = copy.deepcopy(small_tokenizers["chatml"])
    without_eos.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        encoder_for(without_eos, DataOptions(format="text"))


# ---------------------------------------------------------------------------------------------- held out


def test_documents_are_held_out_whole_where_there_are_enough(write, load, encoders):
    path = write("tales.jsonl", [{"text": tale} for tale in TALES])
    data = load(encoders["bos", False], path, format="text", eval_fraction=0.25, packing=False, max_length=1000)
    sides = [[example.input_ids.tolist() for example in side] for side in (data.train, data.eval)]
    assert len(sides[1]) == 3
    assert sorted(sides[0] + sides[1]) == sorted(tokens_of(encoders["bos"], tale) for tale in TALES)


def test_a_share_of_less_than_two_documents_is_refused(write, read):
    path = write("tales.jsonl", [{"text": tale} for tale in TALES[:7]])
    with pytest.raises(ConfigError, match=r"data\.eval_fraction = 0\.25 of 7 rows .* two documents of text: name"):
        read(path, format="text", eval_fraction=0.25)


def test_held_out_files_and_limit(write, load, encoders):
    train = write("tales.jsonl", [{"text": tale} for tale in TALES])
    held_out = write("held.txt", TALES[3])
    data = load(encoders["bos"], train, eval=[held_out], format="text", limit=2, max_length=16)
    full = load(encoders["bos"], train, eval=[held_out], format="text", max_length=16)
    assert len(data.train) == 2
    assert data.train.ids == full.train.ids[:2]
    assert data.train.fingerprint != full.train.fingerprint
    assert len(data.eval) == len(full.eval) > 2
    assert "no more than the first 2 training windows are used (data.limit)" in data.report.notes
    assert data.report.counts == {"eval_in_train": 1}
