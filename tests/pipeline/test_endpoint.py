"""A reference behind a server: the same dynamics as from its weights, and each row asked for once.

The server is a local one that scores prompts by a real model, in the formats of vLLM's completions and of SGLang's own
API: `with Server(model) as server:` serves on a port of its own.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.components import FromEndpoint
from sftmix.components.others import endpoint
from sftmix.disk.files import hashed
from sftmix.tools.quickstart import write_jsonl
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.forked import SIGKILLED, start
from tests.pipeline.test_reference import letters
from tests.tiny import table


class Server(ThreadingHTTPServer):
    """answered: the ids of every prompt that got its log-probabilities, texts left out.

    faults  for the next requests for ids, one each: a status that is answered in place of 200, "drop" for a connection
            that ends in the middle of the answer, "deep" for lists in lists
    change  is called with every list of positions before it is sent
    key     that requests must bring
    place   of another server, to which a redirect leads
    """

    request_queue_size = 128  # of connections over socketserver's five Linux drops some, which then wait for seconds
    key: str | None = None
    place = ""

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.answered: list[tuple[int, ...]] = []
        self.faults: list[int | str] = []
        self.change: Callable[[list[Any]], list[Any] | None] = lambda positions: positions
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def scores(self, ids: list[int]) -> list[dict[int, tuple[float, int]] | None]:
        """Log-probability and rank of the own and of the highest id at each position but the first."""
        with torch.no_grad():
            logp = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)
        each: list[dict[int, tuple[float, int]] | None] = [None]
        for own, at in zip(ids[1:], logp[:-1], strict=True):
            top = int(at.argmax())
            each.append({top: (float(at[top]), 1), own: (float(at[own]), 1 + int((at > at[own]).sum()))})
        return each

    def vllm(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 1)
        positions = [
            at and {str(i): {"logprob": logprob, "rank": rank} for i, (logprob, rank) in at.items()}
            for at in self.scores(ids)
        ]
        return {"choices": [{"text": "x", "prompt_logprobs": self.change(positions)}]}

    def sglang(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        assert body["return_logprob"]
        own, top = [], []
        for i, at in list(zip(ids, self.scores(ids), strict=True))[body["logprob_start_len"] :]:
            first = at is None or not own
            own.append([None if first else at[i][0], i, None])
            top.append(None if first else [[*next(iter(at.items()))[::-1], None]])
        return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body.get("prompt") or body.get("text") or body["input_ids"]
        is_text = isinstance(prompt, str)
        with server.lock:
            fault = server.faults.pop(0) if server.faults and not is_text else 200
            if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                fault = 401
            answer = server.vllm if self.path == "/v1/completions" else server.sglang
            answered = answer(server.tokenizer(prompt)["input_ids"] if is_text else prompt, body)
            data = json.dumps(answered if fault in (200, "drop") else {"error": "no"}).encode()
            if fault == "deep":
                data = b"[" * 100_000
            if fault == 200 and not is_text:
                server.answered.append(tuple(prompt))
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Location", server.place)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


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


def assert_dynamics_of(made, tiny, *paths, more: Sequence[str] = ()) -> None:
    """The dynamics of the run are those of models on disk."""
    words = ("--reference", "FromCheckpoints", "--reference.paths", f"[{', '.join(map(str, paths))}]", *more)
    weights = made("confidence", *tiny.bare, *words, out="weights")
    found, expected = (table(run / "confidence" / "dynamics.parquet") for run in (weights.with_name("run"), weights))
    assert found.pop("nll_sum") == pytest.approx(expected.pop("nll_sum"), rel=1e-5)
    if more:
        assert found.pop("alone_nll_sum") == pytest.approx(expected.pop("alone_nll_sum"), rel=1e-5)
        for column in ("token_nll", "alone_token_nll"):  # stored as float16
            for one, other in zip(found.pop(column), expected.pop(column), strict=True):
                assert one == pytest.approx(other, rel=2e-3)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "path"), [("FromEndpoint", "/v1"), pytest.param("FromSGLang", "", marks=pytest.mark.slow)]
)
def test_servers_give_the_dynamics_of_their_models(name, path, finished, tiny, server, other, made):
    urls = f"[{other.url}{path}, {server.url}{path}/]"
    made("confidence", *tiny.bare, "--reference", name, "--reference.url", urls)
    assert_dynamics_of(made, tiny, tiny.model, finished.path / "train" / "model")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path"), [("FromEndpoint", "/v1"), ("FromSGLang", "")])
def test_servers_score_tokens_and_responses_without_their_instructions(name, path, finished, tiny, server, made):
    more = ("--reference.token_nll", "true", "--reference.response_alone", "true", "--confidence", "IFD")
    made("confidence", *tiny.bare, "--reference", name, "--reference.url", f"{server.url}{path}", *more)
    assert len(server.answered) == 2 * 29
    assert_dynamics_of(made, tiny, finished.path / "train" / "model", more=more)


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


@pytest.mark.parametrize("url", [[], ["http://a/v1", "http://a/v1/"], "a/v1"], ids=str)
def test_servers_that_cannot_be_checkpoints_are_refused(url):
    with pytest.raises(ConfigError, match=r"reference\.url is .*; allowed: http://HOST:PORT/v1, .* each once"):
        FromEndpoint(url=url)


NONE = [False, math.nan, -math.inf, None, -(10**40), "x", 1e-9, "-1.0", True, 0.5, [1]]


@pytest.mark.parametrize("value", some_fast(NONE, every=2), ids=str)
def test_what_is_no_log_probability_is_not_kept(value, tiny, server, made, refused):
    def spoil(positions):
        if len(server.answered) == 3:
            positions[-1] = {name: {**one, "logprob": value} for name, one in positions[-1].items()}
        return positions

    server.change = spoil
    words = asked(tiny, server, "--reference.concurrency", "1")
    assert "is no log-probability" in refused(*words, code=3)
    server.change = list  # a mended server is asked for the rest
    made(*words)
    assert len(server.answered) == 30  # once more for that row


def test_an_answer_of_lists_in_lists_is_none(tiny, server, refused):
    server.faults = ["deep"]
    words = asked(tiny, server, "--reference.retries", "0")
    assert "gives no answer: maximum recursion depth" in refused(*words, code=3)


def line_of(file: Path, **changes: Any) -> None:
    """Change the first score of a file, and give its line the hash that it then needs."""
    batches = [json.loads(line) for line in file.read_text().splitlines()]
    records = [{**batches[0]["records"][0], **changes}]
    lines = [hashed({"file": file.name, "records": records}), *batches[1:]]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


CHANGES = [{"of": "0" * 64}, {"nll": None}, {"nll": -1.0}, {"nll": math.nan}, {"nll": "1"}, {"tokens": 10**40}]
CHANGES += [{"correct": True}, {"correct": 10**4}, {"id": []}]


@pytest.mark.parametrize("changes", some_fast(CHANGES, every=4), ids=str)
def test_a_file_of_other_scores_is_named(changes, tiny, server, refused):
    """As far as it could be continued: the second row's answer is none."""
    scores = tiny.model.parent / "run" / "reference" / "scores-1.jsonl"
    server.change = lambda positions: positions if len(server.answered) < 2 else []
    words = asked(tiny, server, "--reference.concurrency", "1")
    refused(*words, code=3)
    line_of(scores, **changes)
    server.change = list
    answered = len(server.answered)
    said = refused(*words, code=4)
    assert "reference/scores-1.jsonl is not as a run writes it" in said
    assert len(server.answered) == answered


def test_no_redirect_is_followed_and_no_answer_read_without_end(tiny, server, other, refused, monkeypatch):
    server.place, server.key = f"{other.url}/v1/completions", None
    server.faults = [302]
    words = asked(tiny, server, "--reference.retries", "0")
    assert "answers 302" in refused(*words)
    assert other.answered == []
    monkeypatch.setattr(endpoint, "MOST", 100)
    assert "it has over 100 bytes" in refused(*words, code=3)


@pytest.mark.slow
def test_a_killed_run_asks_for_no_row_twice(finished, tiny, server, made):
    words = asked(tiny, server, "--reference.concurrency", "1")
    scores = tiny.model.parent / "run" / "reference" / "scores-1.jsonl"

    def kill(positions):
        if len(server.answered) == 10:
            while scores.read_bytes().count(b"\n") < 10:
                time.sleep(0.01)
            job.kill()
            raise BrokenPipeError("nobody reads the answer")
        return positions

    server.change = kill
    job = start([*words, "--out", "run"], cwd=tiny.model.parent)
    assert job.wait() == [SIGKILLED]
    assert len(server.answered) == 10
    server.change = list
    with scores.open("ab") as file:
        file.write(b'[{"id": "cut in the mid')
    made(*words)
    assert len(server.answered) == 29
    assert_dynamics_of(made, tiny, finished.path / "train" / "model")


@pytest.mark.slow
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
    write_jsonl(tiny.train, [{"text": "sort the words of this list " * 30}, {"text": "add"}])
    write_jsonl(tiny.eval, [{"text": "sort"}])
    words = [*asked(tiny, other), "--data.max_length", "24", "--data.format", "text"]
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
