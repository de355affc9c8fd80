"""Several processes tokenise like one."""

import os

import pytest

from sftmix.data import encode, make_encoder, prepare, tokenise
from sftmix.options import DataOptions
from tests.data.small_tokenizers import THINKING, chatml_tokenizer


@pytest.fixture
def rows(write) -> str:
    """More parts than processes, with rows that are dropped, cut, and (under THINKING) split into turns."""
    found = []
    for i in range(5 * tokenise.AT_ONCE + 7):
        texts = [f"turn {turn} of {i}" for turn in range(6 if i % 100 == 0 else 2)]
        texts[-1] += " and on" * (90 if i % 50 == 3 else i % 4)
        texts[0] += " and on" * (90 if i % 70 == 5 else 0)
        roles = ["user", "assistant"] * 3
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        found.append({"id": f"row{i}", "messages": chat})
    return write("rows.jsonl", found)


@pytest.fixture
def encoder():
    return make_encoder(chatml_tokenizer(THINKING))


def tokenised(rows, encoder, place, processes):
    options = DataOptions(train=rows, multi_turn="whole", num_proc=processes, cache_dir=str(place))
    data = encode(prepare(options, 0, progress=False), encoder, max_length=60, progress=False)
    (stored,) = place.glob("tokens-*/tokens.arrow")
    return data, stored


@pytest.mark.slow
def test_several_processes_write_the_same_file_and_report(rows, encoder, tmp_path, monkeypatch):
    one, alone = tokenised(rows, encoder, tmp_path / "one", 1)
    seen = set()
    do = tokenise.ProcessPoolExecutor.submit
    monkeypatch.setattr(tokenise.ProcessPoolExecutor, "submit", lambda *a: (seen.add(os.getpid()), do(*a))[1])
    three, together = tokenised(rows, encoder, tmp_path / "three", 3)
    assert seen  # the workers were there
    assert {"truncated", "no_response_token", "split_turns"} <= set(one.report.counts)
    assert one.report == three.report
    assert alone.parent.name == together.parent.name  # the number of processes is in no key
    assert alone.read_bytes() == together.read_bytes()
    assert one.train.fingerprint == three.train.fingerprint
