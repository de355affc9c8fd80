"""A reference behind a server: the same dynamics as from its weights, and each row asked for once."""

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import count

import pytest

from sftmix.common.errors import ConfigError
from sftmix.components import FromEndpoint, endpoint
from tests.forked import SIGKILLED, start
from tests.pipeline.endpoint import Server
from tests.pipeline.test_reference_rows import letters
from tests.tiny import table


@pytest.fixture
def server(finished) -> Iterator[Server]:
    """With the model that the shared run has trained."""
    with Server(finished.path / "train" / "model") as one:
        yield one


@pytest.fixture
def other(tiny) -> Iterator[Server]:
    """With the base model."""
    with Server(tiny.model) as one:
        yield one


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE", 0)


def words_of(tiny, *words: str) -> list[str]:
    return ["confidence", *tiny.bare, "--out", str(tiny.model.parent / "run"), "--reference", *words]


def asked(tiny, server, *words: str) -> list[str]:
    return words_of(tiny, "FromEndpoint", "--reference.url", f"{server.url}/v1", *words)


def from_weights(tiny, sftmix, *paths) -> dict[str, list]:
    """The dynamics of models on disk."""
    place = tiny.model.parent / "weights"
    names = f"[{', '.join(map(str, paths))}]"
    words = ("--reference", "FromCheckpoints", "--reference.paths", names)
    assert sftmix("confidence", *tiny.bare, "--out", str(place), *words).code == 0
    return table(place / "confidence" / "dynamics.parquet")


def assert_same(tiny, expected: dict[str, list]) -> None:
    found = table(tiny.model.parent / "run" / "confidence" / "dynamics.parquet")
    assert found.pop("nll_sum") == pytest.approx(expected["nll_sum"], rel=1e-5)
    assert found == {name: values for name, values in expected.items() if name != "nll_sum"}


@pytest.mark.parametrize(("name", "path"), [("FromEndpoint", "/v1"), ("FromSGLang", "")])
def test_servers_give_the_dynamics_of_their_models(name, path, finished, tiny, server, other, sftmix):
    urls = f"[{other.url}{path}, {server.url}{path}/]"
    done = sftmix(*words_of(tiny, name, "--reference.url", urls))
    assert done.code == 0, done.err
    assert "29/29" in done.err
    assert_same(tiny, from_weights(tiny, sftmix, tiny.model, finished.path / "train" / "model"))


def test_a_server_that_fails_is_asked_again_and_left_in_the_end(finished, tiny, server, sftmix):
    """What was answered is not asked for again, by the same server with as many requests at a time as one likes."""
    server.faults = [200] * 9 + [429, 500, "drop", 503]
    words = asked(tiny, server, "--reference.retries")
    left = sftmix(*words, "3", "--reference.concurrency", "1")
    assert left.code == 3
    assert "503" in left.err
    moved = sftmix(*words, "3", "--reference.url", "http://127.0.0.1:9/v1")
    assert moved.code == 2
    assert "reference.url" in moved.err
    server.faults = [503, 429, "drop"]
    assert sftmix(*words, "4", "--reference.concurrency", "3").code == 0
    assert len(server.answered) == 29
    assert_same(tiny, from_weights(tiny, sftmix, finished.path / "train" / "model"))


@pytest.mark.slow
def test_a_killed_run_asks_for_no_row_twice(finished, tiny, server, sftmix):
    words = asked(tiny, server, "--reference.concurrency", "1")
    scores = tiny.model.parent / "run" / "reference" / "scores-1.jsonl"

    def kill(positions):
        if len(server.answered) == 10:
            while scores.read_bytes().count(b"\n") < 10:
                time.sleep(0.01)
            os.kill(job.processes[0].pid, signal.SIGKILL)
            job.wait()
            server.change = list
            raise BrokenPipeError("nobody reads the answer")
        return positions

    server.change = kill
    job = start(words, cwd=tiny.model.parent)
    assert job.wait() == [SIGKILLED]
    assert len(server.answered) == 10
    with scores.open("ab") as file:
        file.write(b'[{"id": "cut in the mid')
    assert sftmix(*words).code == 0
    assert len(server.answered) == 29
    assert_same(tiny, from_weights(tiny, sftmix, finished.path / "train" / "model"))


def test_a_server_with_another_tokenizer_is_refused_until_that_is_named(tiny, sftmix):
    path = letters(tiny)
    with Server(path) as server:
        refused = sftmix(*asked(tiny, server))
        assert refused.code == 2
        assert "reference.tokenizer" in refused.err
        assert server.answered == []
        named = sftmix(*asked(tiny, server, "--reference.tokenizer", str(path)))
    assert named.code == 0, named.err
    assert_same(tiny, from_weights(tiny, sftmix, path))


@pytest.mark.parametrize(
    ("change", "first", "code", "told"),
    [
        (lambda positions: positions[:-1], 1, 3, "tokens (ValueError"),
        (lambda positions: [None, *({"0": at["1"]} if "1" in at else {} for at in positions[1:])], 1, 3, "KeyError"),
        (lambda positions: None, 0, 2, "TypeError"),
    ],
    ids=["cut", "other ids", "a server without them"],
)
def test_answers_that_are_not_of_the_row_are_refused(change, first, code, told, tiny, server, sftmix):
    calls = count()
    server.change = lambda positions: positions if next(calls) < first else change(positions)
    done = sftmix(*asked(tiny, server))
    assert done.code == code
    assert told in done.err
    assert (", row " in done.err) == (code == 3)


def test_a_key_is_read_from_the_environment(tiny, server, sftmix, monkeypatch):
    server.key = "secret"
    refused = sftmix(*asked(tiny, server))
    assert refused.code == 2
    assert "401" in refused.err
    monkeypatch.setenv("OUR_KEY", "secret")
    assert sftmix(*asked(tiny, server, "--reference.key_variable", "OUR_KEY")).code == 0


def test_windows_of_several_documents_are_refused_and_pieces_of_one_are_scored(tiny, other, sftmix):
    tiny.train.write_text(
        json.dumps({"text": "sort the words of this list " * 30}) + "\n" + json.dumps({"text": "add"})
    )
    tiny.eval.write_text(json.dumps({"text": "sort"}))
    words = [*asked(tiny, other), "--data.max_length", "24"]
    packed = sftmix(*words)
    assert packed.code == 2
    assert "data.packing false" in packed.err
    assert sftmix(*words, "--data.packing", "false").code == 0
    assert len(other.answered) > 4


@pytest.mark.parametrize(
    "wrong",
    [{"url": "localhost:8000/v1"}, {"url": "http://h/v1", "concurrency": 0}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"reference.{list(wrong)[-1]} is .*; allowed: "):
        FromEndpoint(**wrong)
