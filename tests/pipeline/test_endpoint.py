"""A reference behind a server: the same dynamics as from its weights, and each row asked for once."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import count

import pytest

from sftmix.common.errors import ConfigError
from sftmix.components import FromEndpoint, endpoint
from sftmix.tools.quickstart import write_rows
from tests.forked import SIGKILLED, start
from tests.pipeline.endpoint import Server
from tests.pipeline.test_reference import letters
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


def asked(tiny, server, *words: str) -> list[str]:
    kind = ("--reference", "FromEndpoint", "--reference.url", f"{server.url}/v1")
    return ["confidence", *tiny.bare, *kind, *words]


def assert_dynamics_of(made, tiny, *paths) -> None:
    """The dynamics of the run are those of models on disk."""
    words = ("--reference", "FromCheckpoints", "--reference.paths", f"[{', '.join(map(str, paths))}]")
    weights = made("confidence", *tiny.bare, *words, out="weights")
    found, expected = (table(run / "confidence" / "dynamics.parquet") for run in (weights.with_name("run"), weights))
    assert found.pop("nll_sum") == pytest.approx(expected.pop("nll_sum"), rel=1e-5)
    assert found == expected


@pytest.mark.parametrize(("name", "path"), [("FromEndpoint", "/v1"), ("FromSGLang", "")])
def test_servers_give_the_dynamics_of_their_models(name, path, finished, tiny, server, other, made):
    urls = f"[{other.url}{path}, {server.url}{path}/]"
    made("confidence", *tiny.bare, "--reference", name, "--reference.url", urls)
    assert_dynamics_of(made, tiny, tiny.model, finished.path / "train" / "model")


def test_a_server_that_fails_is_asked_again_and_left_in_the_end(finished, tiny, server, made, refused):
    """What was answered is not asked for again, by the same server with as many requests at a time as one likes."""
    server.faults = [200] * 9 + [429, 500, "drop", 503]
    words = asked(tiny, server, "--reference.retries")
    assert "503" in refused(*words, "3", "--reference.concurrency", "1", code=3)
    assert "reference.url" in refused(*words, "3", "--reference.url", "http://127.0.0.1:9/v1")
    server.faults = [503, 429, "drop"]
    made(*words, "4", "--reference.concurrency", "3")
    assert len(server.answered) == 29
    assert_dynamics_of(made, tiny, finished.path / "train" / "model")


@pytest.mark.slow
def test_a_killed_run_asks_for_no_row_twice(finished, tiny, server, made):
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
    job = start([*words, "--out", "run"], cwd=tiny.model.parent)
    assert job.wait() == [SIGKILLED]
    assert len(server.answered) == 10
    with scores.open("ab") as file:
        file.write(b'[{"id": "cut in the mid')
    made(*words)
    assert len(server.answered) == 29
    assert_dynamics_of(made, tiny, finished.path / "train" / "model")


def test_a_server_with_another_tokenizer_is_refused_until_that_is_named(tiny, made, refused):
    path = letters(tiny)
    with Server(path) as server:
        assert "reference.tokenizer" in refused(*asked(tiny, server))
        assert server.answered == []
        made(*asked(tiny, server, "--reference.tokenizer", str(path)))
    assert_dynamics_of(made, tiny, path)


@pytest.mark.parametrize(
    ("change", "first", "code", "told"),
    [
        (lambda positions: positions[:-1], 1, 3, "tokens (ValueError"),
        (lambda positions: [None, *({"0": at["1"]} if "1" in at else {} for at in positions[1:])], 1, 3, "KeyError"),
        (lambda positions: None, 0, 2, "TypeError"),
    ],
    ids=["cut", "other ids", "a server without them"],
)
def test_answers_that_are_not_of_the_row_are_refused(change, first, code, told, tiny, server, refused):
    calls = count()
    server.change = lambda positions: positions if next(calls) < first else change(positions)
    said = refused(*asked(tiny, server), code=code)
    assert told in said
    assert (", row " in said) == (code == 3)


def test_a_key_is_read_from_the_environment(tiny, server, made, refused, monkeypatch):
    server.key = "secret"
    assert "401" in refused(*asked(tiny, server))
    monkeypatch.setenv("OUR_KEY", "secret")
    made(*asked(tiny, server, "--reference.key_variable", "OUR_KEY"))


def test_windows_of_several_documents_are_refused_and_pieces_of_one_are_scored(tiny, other, made, refused):
    write_rows(tiny.train, [{"text": "sort the words of this list " * 30}, {"text": "add"}])
    write_rows(tiny.eval, [{"text": "sort"}])
    words = [*asked(tiny, other), "--data.max_length", "24"]
    assert "data.packing false" in refused(*words)
    made(*words, "--data.packing", "false")
    assert len(other.answered) > 4


@pytest.mark.parametrize(
    "wrong",
    [{"url": "localhost:8000/v1"}, {"url": "http://h/v1", "concurrency": 0}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"reference.{list(wrong)[-1]} is .*; allowed: "):
        FromEndpoint(**wrong)
