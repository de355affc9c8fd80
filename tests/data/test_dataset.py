"""The tokenised dataset, its cache and its report, through prepare and encode."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sftmix.common.errors import ConfigError, DataError, NoSpaceError
from sftmix.data import encode, load_data, make_encoder, prepare
from sftmix.data.store import get_or_build
from tests.data.small_tokenizers import chatml_tokenizer

ROWS = [{"instruction": f"Say {i}.", "output": f"{i} " * (1 + i % 7), "score": i / 2} for i in range(50)]


@pytest.fixture
def encoder(small):
    return make_encoder(small["chatml"])


def load(options, encoder, **more):
    return load_data(options, encoder, max_length=more.pop("max_length", 64), seed=0, progress=False, **more)


def test_rows_as_documented(write, options, encoder):
    rows = [{**row, "quality": "high" if i % 2 else "low"} for i, row in enumerate(ROWS)]
    data = load(options(write("rows.jsonl", rows), label_field="quality"), encoder)
    assert len(data.train) == len(data.train.ids) == 50
    assert data.eval is None
    for row, encoded in enumerate(data.train):
        assert (encoded.row, encoded.id) == (row, data.train.ids[row])
        assert (encoded.input_ids.dtype, encoded.target.dtype) == (np.int64, np.bool_)
        assert data.train.lengths[row] == len(encoded.input_ids)
        assert data.train.n_targets[row] == encoded.target.sum()
        said = encoder.tokenizer.decode(encoded.input_ids[encoded.target])
        assert said == data.train.example(row).messages[-1].content + "<|im_end|>"
    assert data.train.labels == ["low", "high"] * 25
    assert data.train.columns == {"score": [i / 2 for i in range(50)]}
    assert data.train[-1].row == 49
    assert [e.row for e in data.train[3:6]] == [3, 4, 5]
    with pytest.raises(IndexError):
        data.train[50]


def test_a_row_s_weight_times_a_turn_s_is_that_of_each_response_token(write, options, encoder):
    turns = [("user", "a", {}), ("assistant", "b c", {"weight": 0.5}), ("user", "d", {}), ("assistant", "e", {})]
    row = {"weight": 3, "messages": [{"role": role, "content": text, **more} for role, text, more in turns]}
    path = write("rows.jsonl", [row, {**row, "weight": None, "messages": row["messages"][2:]}])
    whole = load(options(path, multi_turn="whole"), encoder)
    first, second = whole.train
    responses = np.flatnonzero(np.diff(first.target.astype(int)) == 1) + 1
    assert first.weight.dtype == np.float32
    assert first.weight[first.target].tolist() == [1.5 if k < responses[1] else 3 for k in np.flatnonzero(first.target)]
    assert second.weight is None
    assert whole.train.columns["weight"] == [3, None]
    assert whole.report.counts["weighted"] == 1
    turns = load(options(path), encoder).train
    assert [None if e.weight is None else set(e.weight[e.target]) for e in turns] == [{1.5}, {3}, None]
    table = load(options(write("rows.csv", "instruction,output,weight\na,b,0.5\nc,d,\n")), encoder).train
    assert [None if e.weight is None else set(e.weight[e.target]) for e in table] == [{0.5}, None]


def test_the_second_load_reads_the_cache(write, options, encoder, monkeypatch):
    path = write("rows.jsonl", ROWS)
    first = load(options(path, eval_fraction=0.2), encoder)
    monkeypatch.setattr("sftmix.data.tokenise.encode_examples", None)  # would fail if anything were tokenised again
    monkeypatch.setattr("sftmix.data.rows.convert", None)
    second = load(options(path, eval_fraction=0.2), encoder)
    assert second.report.lines() == first.report.lines()
    assert second.train.fingerprint == first.train.fingerprint
    assert second.eval.ids == first.eval.ids
    for a, b in zip(first.train, second.train, strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.target, b.target)


def test_the_fingerprint_follows_what_the_tokens_are_made_from(write, options, encoder, small):
    """One byte of a file, the template, the tokenizer, the length, the side; not the file's name."""
    path = write("rows.jsonl", ROWS)
    base = load(options(path), encoder).train.fingerprint
    assert load(options(write("renamed.jsonl", ROWS)), encoder).train.fingerprint == base
    others = [
        load(options(path), encoder, max_length=63),
        load(options(path), make_encoder(small["chatml"], "alpaca")),
        load(options(path), make_encoder(small["bos"], "chatml")),
        load(options(path, multi_turn="whole"), encoder),
        load(options(path, limit=49), encoder),
        load(options(path, eval_fraction=0.1), encoder),
    ]
    before = os.stat(path)
    write("rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "output": "50"[::-1] + " " * 12}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = load(options(path), encoder)
    assert changed.train.example(49).messages[1].content.startswith("05")
    found = [other.train.fingerprint for other in (*others, changed)]
    assert len({base, *found}) == 1 + len(found)


def one_bit_of(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_damaged_cache_is_built_anew(write, options, encoder, tmp_path, capsys):
    path = write("rows.jsonl", ROWS)
    first = load(options(path), encoder)
    for file in sorted((tmp_path / "cache").glob("*/*")):
        content = file.read_bytes()
        for damage in (content[: len(content) // 2], b"", None, bytes(len(content)), one_bit_of(content)):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            again = load(options(path), encoder)
            assert [e.input_ids.tolist() for e in again.train] == [e.input_ids.tolist() for e in first.train]
            assert f"{file.parent} is not as it was written, and is made again" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob(".*"))  # nothing half-built is left


def test_of_two_that_need_the_same_one_builds_it(tmp_path):
    builds = []

    def build(directory):
        builds.append(directory)
        time.sleep(0.3)  # the other one waits now
        return {}

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: get_or_build(str(tmp_path), "key", build), range(2)))
    assert len(builds) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EACCES, ConfigError)])
def test_a_cache_that_cannot_be_written(number, kind, tmp_path):
    def build(directory):
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=r"--data\.cache_dir or \$SFTMIX_CACHE"):
        get_or_build(str(tmp_path), "key", build)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rows.jsonl", "novel.txt"])
def test_a_full_disk_is_not_taken_for_a_file_that_cannot_be_read(name, write, options, monkeypatch):
    path = write(name, json.dumps(ROWS[0]) + "\n")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sftmix.data.rows.write_rows", full)
    with pytest.raises(NoSpaceError, match=r"cannot write the tokenisation cache"):
        prepare(options(path), 0, progress=False)


# ------------------------------------------------------------------------------ dropped, kept and split


def test_rows_without_response_tokens_are_dropped_counted_and_named(write, options, encoder):
    rows = [
        *ROWS[:3],
        {"id": "long", "instruction": "word " * 60, "output": "x"},
        {"instruction": "a", "output": "y" * 99},
    ]
    path = write("rows.jsonl", rows)
    data = load(options(path), encoder)
    assert data.report.counts == {"no_response_token": 1, "truncated": 1}
    assert len(data.train) == 4
    assert data.train.truncated.tolist() == [False, False, False, True]
    assert data.train.n_targets.min() > 0
    named = f"1 example dropped: no response token left within data.max_length = 64: long ({path}:4)"
    assert named in data.report.lines()
    with pytest.raises(
        DataError, match=r"(?s)data\.train: no example is left with data\.max_length = 4:.*5 examples dropped"
    ):
        load(options(path), encoder, max_length=4)
    with pytest.raises(ConfigError, match=r"data\.max_length must be at least 2"):
        load(options(path), encoder, max_length=1)


def test_another_tokenizer_gives_the_same_ids_and_some_may_be_kept(write, options, encoder, small):
    """As for a weaker reference: all joins by id."""
    prepared = prepare(options(write("rows.jsonl", ROWS)), 0, progress=False)
    target = encode(prepared, encoder, max_length=64, progress=False).train
    other = make_encoder(small["metaspace"])
    full = encode(prepared, other, max_length=200, progress=False).train
    assert full.ids == target.ids
    kept = encode(prepared, other, max_length=200, keep=target.ids[10:20], progress=False).train
    assert kept.ids == target.ids[10:20]
    assert kept.fingerprint != full.fingerprint


@pytest.mark.parametrize("name", ["models/base-7m", "tokenizers/mistral-7b-v0.3"])
@pytest.mark.parametrize("file", ["sgd_messages_2k.jsonl", "lima_history_220.json"])
@pytest.mark.parametrize("multi_turn", ["per_turn", "whole"])
def test_real_conversations(name, file, multi_turn, shared, options):
    """Every trained span of real dialogues is the text of an assistant turn and the end of the turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / name)
    encoder = make_encoder(tokenizer)
    path = str(shared / "data/multiturn" / file)
    data = load(options(path, multi_turn=multi_turn, limit=60), encoder, max_length=100_000)
    assert set(data.report.counts) <= {"duplicate"}
    for row, encoded in enumerate(data.train):
        said = [m.content for m in data.train.example(row).messages if m.trained]
        edges = np.flatnonzero(np.diff(np.r_[0, encoded.target.astype(int), 0])).reshape(-1, 2)
        spans = [tokenizer.decode(encoded.input_ids[a : b - 1]) for a, b in edges]
        assert [s.strip() for s in spans] == [s.strip() for s in said]
        assert {int(encoded.input_ids[b - 1]) for _, b in edges} == {encoder.end_of_turn_id}
        if tokenizer.bos_token_id is not None:
            assert (encoded.input_ids == tokenizer.bos_token_id).sum() <= 1


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("refused", "stops"), [(2, False), (3, True)])
def test_a_template_that_loses_more_than_a_twentieth_of_the_rows_is_refused(refused, stops, write, options):
    encoder = make_encoder(chatml_tokenizer(STRICT))
    path = write("rows.jsonl", [{**row, "system": "S" if i < refused else None} for i, row in enumerate(ROWS)])
    if stops:
        with pytest.raises(DataError, match=r"tokenizer cannot encode 3 of 50 training examples(.|\n)*no system turns"):
            load(options(path), encoder)
    data = load(options(path, skip_bad=stops), encoder)
    assert len(data.train) == 50 - refused
    assert data.report.counts["template_refused"] == refused
