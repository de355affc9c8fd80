"""Plain text: how documents are read, numbered, held out, tokenised and cut into windows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from sftmix.common.errors import ConfigError, DataError
from sftmix.data import load_data, prepare, render_preview
from sftmix.data.encoders import text_encoder
from sftmix.data.text import stretches, windows
from sftmix.data.textrows import iter_text
from sftmix.options import DataOptions
from tests.data.small_tokenizers import SMALL

TALES = [f"Tale {i}.\n\n" + " ".join(f"Then {j} came {i * j}." for j in range(3 + i)) + "\n" for i in range(12)]


@pytest.fixture(scope="session")
def encoders(small):
    return {name: text_encoder(tokenizer) for name, tokenizer in small.items()}


def load(options, encoder, *, max_length=16, seed=0):
    return load_data(options, encoder, max_length=max_length, seed=seed, progress=False)


def tokens_of(encoder, text: str, *, begins: bool = True, ends: bool = True) -> list[int]:
    """A document as the tokenizer itself would write it, then eos."""
    tokenizer = encoder.tokenizer
    ids = tokenizer(text, add_special_tokens=begins)["input_ids"]
    return ids + ([tokenizer.eos_token_id] if ends else [])


def expected_windows(documents: list[list[int]], length: int, *, packed: bool) -> list[tuple[list[int], list[int]]]:
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
    st.integers(1, 5),
    st.booleans(),
)
def test_windows_hold_every_token_of_every_document_once(documents, length, stretch, packed):
    stream = [
        (record, at, ids[at : at + stretch])
        for record, ids in enumerate(documents)
        for at in range(0, len(ids), stretch)
    ]
    found = list(windows(stream, length, packed=packed))
    assert [t for w in found for t in w.input_ids] == [t for ids in documents for t in ids]
    assert max(len(w.input_ids) for w in found) <= length
    if packed:
        assert all(len(w.input_ids) == length for w in found[:-1])
    kept = [w for w in found if len(w.spans)]
    assert [(w.input_ids, w.starts) for w in kept] == expected_windows(documents, length, packed=packed)
    # Nothing predicts the first token of a document, or of a window: all the others are targets.
    total = sum(len(ids) for ids in documents)
    bounds = np.cumsum([0] + [len(ids) for ids in documents])[:-1]
    cuts = (
        range(0, total, length)
        if packed
        else [b + k for b, d in zip(bounds, documents, strict=True) for k in range(0, len(d), length)]
    )
    untrained = {*bounds.tolist(), *cuts}
    assert sum(int((w.spans[:, 1] - w.spans[:, 0]).sum()) for w in found) == total - len(untrained)
    for window in found:
        document = documents[window.records[0]]
        first = document[window.offset : window.offset + len(window.input_ids)]
        assert window.input_ids[: len(first)] == first


def test_the_id_of_a_window_is_what_it_holds(write, options, encoders):
    def names(stream, length):
        return [w.content_hash() for w in windows(stream, length, packed=True)]

    first = names([(0, 0, [1, 2]), (1, 0, [3, 4])], 4)
    assert first == names([(7, 0, [1, 2]), (9, 0, [3, 4])], 4)
    assert first != names([(0, 0, [1, 2, 3, 4])], 4)
    path = write("echo.jsonl", [{"text": TALES[0]}] * 3)
    (one, *rest) = load(options(path, packing=False), encoders["bos"], max_length=1000).train.ids
    assert rest == [f"{one}#1", f"{one}#2"]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("packing", [None, False])
def test_documents_become_windows(kind, packing, write, options, encoders):
    encoder = encoders[kind]
    path = write("tales.jsonl", [{"text": tale, "score": i} for i, tale in enumerate(TALES)])
    data = load(options(path, packing=packing), encoder, max_length=30)
    expected = expected_windows([tokens_of(encoder, tale) for tale in TALES], 30, packed=packing is None)
    assert [(e.input_ids.tolist(), e.starts.tolist()) for e in data.train] == expected
    for encoded in data.train:
        assert np.flatnonzero(~encoded.target).tolist() == encoded.starts.tolist()
        assert not encoded.truncated
    assert data.train.packed is (packing is None)
    assert data.train.n_targets.tolist() == [int(e.target.sum()) for e in data.train]
    assert len(data.train.columns.get("score", [])) == (0 if packing is None else len(data.train))
    assert any(line.startswith("12 documents read") for line in data.report.lines())
    assert data.report.tokens == (sum(len(ids) for ids, _ in expected), 0)
    again = load(options(path, packing=packing), encoder, max_length=30)
    assert again.train.ids == data.train.ids
    assert len(set(data.train.ids)) == len(data.train)


def test_a_label_of_a_document_is_that_of_its_pieces(write, options, encoders):
    rows = [{"text": tale, "quality": "high" if i % 2 else "low"} for i, tale in enumerate(TALES)]
    path = write("tales.jsonl", rows)
    data = load(options(path, packing=False, label_field="quality"), encoders["bos"], max_length=30)
    assert set(data.train.labels) == {"high", "low"}
    assert [data.train.example(row).label for row in range(len(data.train))] == data.train.labels


# --------------------------------------------------------------------------------------------- stretches


@pytest.mark.parametrize("kind", SMALL)
def test_a_long_text_is_tokenised_as_if_in_one_call(kind, encoders):
    text = "\n".join(TALES * 20)
    parts = list(stretches(encoders[kind], (text[at : at + 700] for at in range(0, len(text), 700)), size=10_000))
    assert len(parts) > 2
    assert [t for part in parts for t in part] == encoders[kind].tokenize([text])[0]


def test_a_long_text_of_few_tokens_is_tokenised_as_if_in_one_call():
    """White space is no token of this tokenizer: what both stretches read has fewer tokens than are compared."""
    backend = Tokenizer(WordLevel({"<end>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(100)}}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    encoder = text_encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>"))
    text = "".join(f"w{i}{' ' * 700}\n" for i in range(100))
    parts = list(stretches(encoder, (text[at : at + 700] for at in range(0, len(text), 700)), size=10_000))
    assert len(parts) > 2
    assert [t for part in parts for t in part] == [i + 2 for i in range(100)]


def test_a_text_without_newlines_is_tokenised_in_one_call(encoders):
    text = "one two three " * 3000
    parts = list(stretches(encoders["bos"], iter([text[:20_000], text[20_000:]]), size=10_000))
    assert len(parts) == 1
    assert parts[0] == encoders["bos"].tokenize([text])[0]


def test_novels_are_tokenised_as_if_in_one_call(tokenizer, shared):
    """Every real tokenizer, cut about every 20,000 characters; what is compared with is the whole file in one call."""
    encoder = text_encoder(tokenizer)
    for path in sorted((shared / "data/text").glob("*.txt")):
        text = "".join(iter_text(path, path.name))[:70_000]
        parts = list(stretches(encoder, (text[at : at + 5000] for at in range(0, len(text), 5000)), size=20_000))
        assert len(parts) > 2
        assert [t for part in parts for t in part] == encoder.tokenize([text])[0]


# ----------------------------------------------------------------------------------------------- reading


def test_text_files_are_documents(write, options, encoders, tmp_path):
    crlf = write("a.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo caf\xc3\xa9s.\r\n")
    plain = write("b.txt", "Three.\n")
    empty = write("c.txt", " \n\n")
    prepared = prepare(options(crlf, plain, empty), 0, progress=False)
    texts = ["".join(prepared.train.text(record)) for record in prepared.train.records.tolist()]
    assert texts == ["One.\n\nTwo cafés.\n", "Three.\n"]
    assert prepared.report.counts == {"empty_document": 1}
    assert prepared.report.rows == 3
    rows = prepare(options(write("rows.jsonl", [{"text": text} for text in texts]), format="text"), 0, progress=False)
    ids = [side.train.id(k) for side in (prepared, rows) for k in (0, 1)]
    assert ids[:2] == ids[2:]


def test_a_piece_ends_within_a_character_or_line_ending(write, options):
    text = "é\r\n" * 40_000  # 65,536 bytes end anywhere
    prepared = prepare(options(write("a.txt", text.encode())), 0, progress=False)
    documents = prepared.train
    assert "".join(documents.text(0)) == "é\n" * 40_000
    assert "".join(documents.text(0, 65_530, 70_001)) == ("é\n" * 40_000)[65_530:70_001]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"text": "a b"}], True),
        ([{"text": "a b", "id": "x", "source": "web"}], True),
        ([{"text": "a", "instruction": "b", "output": "c"}], False),  # as the hub's Alpaca has it
        ([{"text": "a", "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}], False),
    ],
)
def test_auto_takes_rows_for_text_by_their_only_known_field(rows, text, write, options):
    assert prepare(options(write("rows.jsonl", rows)), 0, progress=False).text is text


@pytest.mark.parametrize("first", ['{"text": "a', "42", '{"body": "b"}'], ids=["broken", "number", "unknown"])
def test_a_bad_row_does_not_say_what_the_others_are(first, write, options):
    path = write("rows.jsonl", "\n".join([first, '{"text": "One tale."}', '{"text": "Two tales."}']))
    prepared = prepare(options(path, skip_bad=True), 0, progress=False)
    assert prepared.text
    texts = ["".join(prepared.train.text(record)) for record in prepared.train.records.tolist()]
    assert texts == ["One tale.", "Two tales."]
    assert prepared.report.counts == {"bad_row": 1}
    with pytest.raises(DataError, match=r"^1 bad row .*\n.*rows\.jsonl:1: [^\n]*$"):
        prepare(options(path), 0, progress=False)


def test_an_own_id_is_honoured_and_may_not_occur_twice(write, options):
    path = write("rows.jsonl", [{"id": "moby", "text": "Call me."}, {"id": 7, "text": "Whale."}])
    prepared = prepare(options(path), 0, progress=False)
    assert [prepared.train.id(k) for k in (0, 1)] == ["moby", "7"]
    path = write("twice.jsonl", [{"id": "moby", "text": "Call me."}, {"id": "moby", "text": "Whale."}])
    with pytest.raises(DataError, match=r"twice.jsonl:2: the id 'moby' is taken"):
        prepare(options(path), 0, progress=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nnot \xff fine\n", r"a\.txt:2: not valid UTF-8: byte 0xff"),
        ("a.txt", b"x" * 70_000 + b"\n\n\xc3", r"a\.txt:3: not valid UTF-8"),
        ("a.txt", b"one\ntwo\0\n", r"a\.txt:2: contains a NUL"),
        ("a.txt", "hello".encode("utf-16"), r"a\.txt:1: UTF-16"),
        ("a.jsonl", [{"text": "a"}, {"text": None}], r"a\.jsonl:2: text must be a string, found null"),
        ("a.jsonl", [{"text": "a"}, {"body": "b"}], r"a\.jsonl:2: field 'text' is missing"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', r"a\.jsonl:2: text contains a lone surrogate"),
        ("a.jsonl", [{"instruction": "a", "output": "b"}, {"text": "c"}], r"a\.jsonl:2: a text, where the rows before"),
        ("a.txt", b" \n", "no usable row"),
    ],
)
def test_bad_documents_are_named(name, content, message, write, options):
    path = write(name, content)
    with pytest.raises(DataError, match=message):
        prepare(options(path), 0, progress=False)


def test_a_text_file_has_no_labels_of_its_own(write, options):
    path = write("a.txt", "Text.\n")
    with pytest.raises(DataError, match=r"a\.txt: a text file has no field 'q' \(data\.label_field\)"):
        prepare(options(path, label_field="q", packing=False), 0, progress=False)


def test_bad_documents_can_be_skipped(write, options):
    good = write("good.txt", "Good.\n")
    bad = write("bad.txt", b"x" * 70_000 + b"\xff")
    prepared = prepare(options(bad, good, skip_bad=True), 0, progress=False)
    assert prepared.report.counts == {"bad_row": 1}
    assert "".join(prepared.train.text(0)) == "Good.\n"


def test_text_and_conversations_do_not_mix(write, options):
    text, chat = write("a.txt", "Text.\n"), write("b.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"a\.txt holds plain text and .*b\.jsonl conversations"):
        prepare(options(text, chat), 0, progress=False)
    with pytest.raises(DataError, match=r"data.train holds plain text and data.eval conversations"):
        prepare(options(text, eval=[chat]), 0, progress=False)
    with pytest.raises(DataError, match=r"a\.txt is a text file, but data.format is alpaca"):
        prepare(options(text, format="alpaca"), 0, progress=False)


def test_text_files_beside_rows_are_notes_about_them(write, options, tmp_path):
    write("README.txt", "About these rows.\n")
    assert len(prepare(options(str(tmp_path)), 0, progress=False).train.records) == 1
    write("rows.jsonl", [{"text": "a tale"}])
    assert len(prepare(options(str(tmp_path)), 0, progress=False).train.records) == 1
    assert len(prepare(options(str(tmp_path), format="text"), 0, progress=False).train.records) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"template": "alpaca"}, r"data.template \(alpaca\) and data.format text exclude"),
        ({"num_proc": 2}, r"data.num_proc \(2\) and data.format text exclude"),
        ({"multi_turn": "whole"}, r"data.multi_turn \(whole\) and data.format text exclude"),
        ({"label_field": "q"}, r"data.label_field \(q\) and packed text exclude"),
        ({"labels": ["high"]}, r"data.labels \(high\) and data.format text exclude"),
    ],
)
def test_options_without_meaning_for_text_are_refused(more, message, write, options):
    path = write("rows.jsonl", [{"text": "a tale", "q": "high"}])
    with pytest.raises(ConfigError, match=message):
        prepare(options(path, **more), 0, progress=False)


def test_packing_of_conversations_is_refused(write, options):
    path = write("rows.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(ConfigError, match=r"data.packing is true, but"):
        prepare(options(path, packing=True), 0, progress=False)
    assert not prepare(options(path, packing=False), 0, progress=False).text


def test_a_tokenizer_without_eos_is_refused(small):
    bare = SimpleNamespace(eos_token_id=None)
    with pytest.raises(ConfigError, match="no eos token"):
        text_encoder(bare)


# ---------------------------------------------------------------------------------------------- held out


def test_documents_are_held_out_whole_where_there_are_enough(write, options, encoders):
    path = write("tales.jsonl", [{"id": f"t{i}", "text": tale} for i, tale in enumerate(TALES)])
    encoder = encoders["bos"]
    data = load(options(path, eval_fraction=0.25), encoder, max_length=1000)
    sides = [{i for row in range(len(d)) for _, i, _ in d.pieces(row)} for d in (data.train, data.eval)]
    assert [len(side) for side in sides] == [9, 3]
    assert not sides[0] & sides[1]
    assert data.report.counts == {}
    whole = {f"t{i}": tokens_of(encoder, tale) for i, tale in enumerate(TALES)}
    for side in (data.train, data.eval):
        names = [name for row in range(len(side)) for start, name, _ in side.pieces(row) if start or not row]
        assert [t for e in side for t in e.input_ids.tolist()] == [t for name in names for t in whole[name]]


def test_of_few_documents_the_last_part_of_each_is_held_out(write, options, encoders):
    encoder, tales = encoders["bos"], ["\n".join(TALES), "\n".join(TALES[::-1]), "."]
    path = write("tales.jsonl", [{"text": tale} for tale in tales])
    data = load(options(path, eval_fraction=0.25), encoder, max_length=4000)
    (train,), (held_out,) = data.train, data.eval
    cuts = [tale.index("\n", round(0.75 * len(tale))) + 1 for tale in tales[:2]]
    first = [tokens_of(encoder, tale[:cut], ends=False) for tale, cut in zip(tales, cuts, strict=False)]
    last = [tokens_of(encoder, tale[cut:], begins=False) for tale, cut in zip(tales, cuts, strict=False)]
    assert train.input_ids.tolist() == [*first[0], *first[1], *tokens_of(encoder, ".")]
    assert held_out.input_ids.tolist() == [*last[0], *last[1]]
    assert any("too few to hold out whole ones" in line for line in data.report.lines())
    assert data.report.counts == {}
    other = load(options(path, eval_fraction=0.25), encoder, max_length=4000, seed=9)
    assert other.eval[0].input_ids.tolist() == held_out.input_ids.tolist()


def test_held_out_files_and_limit(write, options, encoders):
    train = write("tales.jsonl", [{"text": tale} for tale in TALES])
    held_out = write("held.txt", TALES[3])
    data = load(options(train, eval=[held_out], limit=2), encoders["bos"])
    full = load(options(train, eval=[held_out]), encoders["bos"])
    assert len(data.train) == 2
    assert data.train.ids == full.train.ids[:2]
    assert data.train.fingerprint != full.train.fingerprint
    assert len(data.eval) == len(full.eval) > 2
    assert "the first 2 training windows are used, the rest left out (data.limit)" in data.report.notes
    assert data.report.counts == {"eval_in_train": 1}


def test_what_changes_the_windows_changes_the_fingerprint(write, options, encoders):
    rows = [{"text": tale} for tale in TALES]
    path = write("tales.jsonl", rows)
    settings: list[tuple[DataOptions, str, int]] = [
        (options(path), "bos", 16),
        (options(path), "bos", 17),
        (options(path), "metaspace", 16),
        (options(path, packing=False), "bos", 16),
        (options(write("other.jsonl", rows[::-1])), "bos", 16),
    ]
    prints = [load(o, encoders[kind], max_length=n).train.fingerprint for o, kind, n in settings]
    assert len(set(prints)) == len(prints)
    assert load(options(path, format="text"), encoders["bos"]).train.fingerprint == prints[0]


# ----------------------------------------------------------------------------------------------- preview


def test_preview_shows_documents_and_mask(write, options, encoders):
    encoder = encoders["chatml"]
    path = write("rows.jsonl", [{"id": "one", "text": "Blue."}, {"id": "two", "text": "A green \x1b[31mcolour."}])
    data = load(options(path), encoder, max_length=200)
    shown = render_preview(data, encoder, [0], color=False)
    head, rest = [encoder.tokenizer.decode(encoder.tokenize([t])[0][:1]) for t in ("Blue.", "A green")]
    assert f"--- one ({path}:1) ---\n{head}[[{'Blue.'[len(head) :]}<|end|>]]" in shown
    assert f"--- two ({path}:2) ---\n{rest}[[{'A green '[len(rest) :]}\\x1b[31mcolour.<|end|>]]" in shown
    assert "\x1b" not in shown
    assert "2 documents read: 1 training and 0 held-out windows of at most 200 tokens" in shown
    example = data.train.example(0)
    assert example.messages[0].content == encoder.tokenizer.decode(data.train[0].input_ids)
    assert json.dumps(data.report.to_dict())
