"""The tokenised dataset, its cache and its report, through prepare and encode."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sftmix.components.row_format import RowFormat
from sftmix.data import prepare
from sftmix.disk.cache import get_or_build
from sftmix.tools.preview.text import render_preview
from sftmix.words.errors import ConfigError, DataError, NoSpaceError
from tests.text.small_tokenizers import QWEN3, chatml_tokenizer, make_encoder

ROWS = [{"instruction": f"Say {i}.", "output": f"{i} " * (1 + i % 7), "score": i / 2} for i in range(50)]


@pytest.fixture
def encoder(small_tokenizers):
    return make_encoder(small_tokenizers["chatml"])


def test_rows_as_documented(write, load, encoder):
    rows = [{**row, "quality": "high" if i % 2 else "low"} for i, row in enumerate(ROWS)]
    train = load(encoder, write("rows.jsonl", rows), label_field="quality").train
    assert len(train) == len(train.ids) == 50
    for row, encoded in enumerate(train):
        assert (encoded.row, encoded.id) == (row, train.ids[row])
        assert (encoded.input_ids.dtype, encoded.target.dtype) == (np.int64, np.bool_)
        assert (train.lengths[row], train.n_targets[row]) == (len(encoded.input_ids), encoded.target.sum())
        assert encoder.decode(encoded.input_ids[encoded.target]) == rows[row]["output"] + "<|im_end|>"
        assert train.example(row).messages[-1].content == rows[row]["output"]
    assert train.labels == ["low", "high"] * 25
    assert train.columns == {"score": [i / 2 for i in range(50)]}
    assert train[-1].row == 49


def test_a_row_s_weight_times_a_turn_s_is_that_of_each_response_token(write, load, encoder):
    turns = [{"role": role, "content": f"{role} {k}"} for k in range(2) for role in ("user", "assistant")]
    turns[1]["weight"] = 0.5
    path = write("rows.jsonl", [{"weight": 3, "messages": turns}, {"weight": None, "messages": turns[2:]}])
    whole = load(encoder, path, multi_turn="whole")
    first, second = whole.train
    responses = np.flatnonzero(np.diff(first.target.astype(int)) == 1) + 1
    assert first.weight.dtype == np.float32
    assert first.weight[first.target].tolist() == [1.5 if k < responses[1] else 3 for k in np.flatnonzero(first.target)]
    assert second.weight is None
    assert whole.train.columns["weight"] == [3, None]
    assert whole.report.counts["weighted"] == 1
    turns = load(encoder, path).train
    assert [None if e.weight is None else set(e.weight[e.target]) for e in turns] == [{1.5}, {3}, None]


def test_what_becomes_of_thoughts_is_kept_apart_in_one_cache(write, load):
    turns = [("user", {"content": "Q?"}), ("assistant", {"content": "Four.", "reasoning_content": "2+2"})]
    path = write("rows.jsonl", [{"messages": [{"role": role, **turn} for role, turn in turns]}])
    trained = {}
    for thoughts in ("train", "drop"):
        encoder = make_encoder(chatml_tokenizer(QWEN3), thoughts=thoughts, thinks=True)
        (row,) = load(encoder, path, thoughts=thoughts, max_length=200).train
        trained[thoughts] = encoder.decode(row.input_ids[row.target]), "2+2" in encoder.decode(row.input_ids)
    assert trained == {
        "train": ("<think>\n2+2\n</think>\n\nFour.<|im_end|>", True),
        "drop": ("Four.<|im_end|>", False),
    }


def test_the_second_load_reads_the_cache(write, load, encoder, monkeypatch):
    path = write("rows.jsonl", ROWS)
    first = load(encoder, path, eval_fraction=0.2)
    monkeypatch.setattr("sftmix.data.tokenise.encode_each", None)  # would fail if anything were tokenised again
    monkeypatch.setattr("sftmix.data.reading.Converter.example", None)
    second = load(encoder, path, eval_fraction=0.2)
    assert second.report == first.report
    assert second.train.fingerprint == first.train.fingerprint
    assert (second.train.ids, second.eval.ids) == (first.train.ids, first.eval.ids)


def test_the_fingerprint_follows_what_the_tokens_are_made_from(write, load, encoder, small_tokenizers):
    """One byte of a file, the template, the tokenizer, the length, the side; not the file's name, nor what changes no
    example: each of these rows has one turn."""
    path = write("rows.jsonl", ROWS)
    base = load(encoder, path).train.fingerprint
    assert load(encoder, write("renamed.jsonl", ROWS)).train.fingerprint == base
    assert load(encoder, path, multi_turn="whole", skip_bad=True).train.fingerprint == base
    others = [
        load(encoder, path, max_length=63),
        load(make_encoder(small_tokenizers["chatml"], "alpaca"), path),
        load(make_encoder(small_tokenizers["bos"], "chatml"), path),
        load(encoder, path, limit=49),
        load(encoder, path, eval_fraction=0.1),
    ]
    before = os.stat(path)
    write("rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "output": "50"[::-1] + " " * 12}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = load(encoder, path)
    assert changed.train.example(49).messages[1].content.startswith("05")
    found = [other.train.fingerprint for other in (*others, changed)]
    assert len({base, *found}) == 1 + len(found)


def test_a_damaged_cache_is_built_anew(write, load, encoder, tmp_path, capsys):
    path = write("rows.jsonl", ROWS)
    first = load(encoder, path)
    for file in sorted((tmp_path / "cache").glob("*/*")):
        content = file.read_bytes()
        for damage in (content[: len(content) // 2], b"", None, content[:-1] + bytes([content[-1] ^ 1])):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            again = load(encoder, path)
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
def test_a_cache_that_cannot_be_written_is_not_taken_for_a_file_that_cannot_be_read(
    number, kind, write, options, monkeypatch, tmp_path
):
    path = write("rows.jsonl", ROWS)

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sftmix.data.reading.write_rows", full)
    with pytest.raises(kind, match=r"cannot write the tokenisation cache.*--data\.cache_dir or \$SFTMIX_CACHE"):
        prepare(options(path), 0)
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_row_format_cannot_open_is_not_taken_for_a_cache_that_cannot_be_written(write, options, tmp_path):
    class Lookup(RowFormat):
        fields = ("word",)

        def read(self, row, *, roles):
            return (tmp_path / "lookup.json").read_text()

    with pytest.raises(FileNotFoundError, match=r"lookup\.json"):
        prepare(options(write("rows.jsonl", [{"word": "a"}])), 0, Lookup())


# ------------------------------------------------------------------------------ dropped, kept and split


def test_rows_without_response_tokens_are_dropped_counted_and_named(write, load, encoder):
    rows = [
        *ROWS[:3],
        {"id": "long", "instruction": "word " * 60, "output": "x"},
        {"instruction": "a", "output": "y" * 99},
    ]
    path = write("rows.jsonl", rows)
    data = load(encoder, path)
    assert data.report.counts == {"no_response_token": 1, "truncated": 1}
    assert len(data.train) == 4
    assert data.train.truncated.tolist() == [False, False, False, True]
    assert data.train.n_targets.min() > 0
    assert any(line.startswith("warning: 25% of the training examples are cut") for line in data.report.lines())
    named = f"1 example dropped: no trained token of a response within data.max_length = 64: long ({path}:4)"
    assert named in data.report.lines()
    with pytest.raises(
        DataError, match=r"(?s)data\.train: no example is left:.*5 examples dropped: .*data\.max_length = 4"
    ):
        load(encoder, path, max_length=4)


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("refused", "stops"), [(2, False), (3, True)])
def test_a_template_that_loses_more_than_a_twentieth_of_the_rows_is_refused(refused, stops, write, load):
    encoder = make_encoder(chatml_tokenizer(STRICT))
    path = write("rows.jsonl", [{**row, "system": "S" if i < refused else None} for i, row in enumerate(ROWS)])
    if stops:
        with pytest.raises(DataError, match=r"tokenizer cannot encode 3 of 50 training examples(.|\n)*no system turns"):
            load(encoder, path)
    data = load(encoder, path, skip_bad=stops)
    assert len(data.train) == 50 - refused
    assert data.report.counts["template_refused"] == refused


# ----------------------------------------------------------------------------------------- the preview


def test_text_mask_and_dropped_rows(write, load, encoder):
    rows = [{"instruction": "Say \x1b[31mred.", "output": "é😀 red"}, {"instruction": "a", "output": ""}]
    data = load(encoder, write("rows.jsonl", rows))
    plain = render_preview(data, encoder, [0], color=False)
    assert "<|im_start|>user\nSay \\x1b[31mred.<|im_end|>\n<|im_start|>assistant\n[[é😀 red<|im_end|>]]" in plain
    assert "1 empty response dropped: " in plain
    assert "\x1b" not in plain
    assert "\x1b[0;32mé😀 red<|im_end|>\x1b[0m" in render_preview(data, encoder, [0])
    lines = plain.split("token\n")[1].split("\n\n")[0].splitlines()
    encoded = data.train[0]
    for place, token, label, *_ in (line.split() for line in lines if "..." not in line):
        assert encoded.input_ids[int(place)] == int(token)
        assert int(label) == (int(token) if encoded.target[int(place)] else -100)
