"""A reference behind a server, which is asked for the log-probabilities of each row's tokens."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from functools import partial
from typing import Any

import numpy as np

from sftmix.components.base import Reference, ReferenceContext
from sftmix.components.component import Need, require
from sftmix.disk.places import refuse_stranger
from sftmix.options.reference import ReferenceModel
from sftmix.types import Bool, Encoded, Float64, RowScorer, TrainingDynamics
from sftmix.words.errors import ConfigError, DataError
from sftmix.words.given import as_list

PROBE = "Name 3 colours: café, naïve, 東京!\n\n  It's 42."
"""A text that the server's tokenizer and the reference's must make the same ids of."""

TIMEOUT, LONGEST_PAUSE = 600.0, 60.0
"""Seconds without an answer after which a request is made again, and the longest pause before that."""

MOST, LOWEST = 1 << 28, float(np.finfo(np.float32).min)
"""Most bytes of an answer; and the lowest log-probability, a finite float32."""


class _AtItsPlace(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take rows and key to another host: it is an answer that is no success."""

    def redirect_request(self, *_: Any) -> None:
        return None  # urllib then raises the HTTPError of its code, such as 302


_OPENER = urllib.request.build_opener(_AtItsPlace)

Positions = list[dict[int, tuple[float, bool]]]
"""The log-probabilities of some ids at each position, the prompt's own among them, and whether each is the highest."""


class FromEndpoint(Reference):
    """A model behind vLLM's OpenAI-compatible server scores every example; nothing is trained.

    Its log-probabilities depend a little on what it computes at the same time, so two runs may differ.
    """

    needs = frozenset()
    gives = frozenset({Need.CORRECT})
    changeable = frozenset({"concurrency", "retries", "key_variable"})

    def __init__(
        self,
        *,
        url: list[str] | str,
        model: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        max_length: int | None = None,
        concurrency: int = 32,
        retries: int = 6,
        key_variable: str | None = None,
        token_nll: bool = False,
        response_alone: bool = False,
    ):
        """
        url: http://HOST:8000/v1; several are several checkpoints, in order.
        model: name that the server gives the model; null: its only one.
        tokenizer: directory or hub id of the model's; null: the target's.
        template: as in FromCheckpoints, for that tokenizer.
        max_length: as in FromCheckpoints; the server needs room for one token more.
        concurrency: requests at a time.
        retries: further attempts if the server is busy (429), fails (5xx) or is not reached, after growing pauses.
        key_variable: environment variable that holds the server's key; null: `EMPTY`.
        token_nll: as in FromCheckpoints.
        response_alone: as in FromCheckpoints; every row is then asked for twice.
        """
        self.urls = [one.rstrip("/") for one in as_list(url)]
        of_http = all(one.startswith(("http://", "https://")) for one in self.urls)
        distinct = 0 < len(set(self.urls)) == len(self.urls)
        require(of_http and distinct, "reference.url", url, "http://HOST:PORT/v1, or https; several, each once")
        require(concurrency >= 1, "reference.concurrency", concurrency, "1 and above")
        self.rows = ReferenceModel(path=tokenizer or "", template=template, max_length=max_length)
        require(retries >= 0, "reference.retries", retries, "0 and above")
        self.name = model
        self.concurrency = concurrency
        self.retries = retries
        self.key_variable = key_variable
        self.token_nll, self.response_alone = token_nll, response_alone
        self.gives = frozenset({Need.CORRECT, *([Need.RESPONSE_ALONE] if response_alone else [])})

    def most_checkpoints(self, epochs: float | None) -> int | None:
        return len(self.urls)

    def files(self) -> list[str]:
        return self.rows.files()

    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        scorers = {url: partial(self._connected, refuse_stranger(url)) for url in self.urls}
        return context.score_rows(scorers, model=self.rows, threads=self.concurrency)

    def _connected(self, url: str, tokenizer: Any) -> RowScorer:
        """Return the function of a row, once a text has shown that the server reads it as the tokenizer does."""

        def log_probabilities(prompt, ids, start, refusal):
            """Return f64[n - 1, 2], what it says of n ids, the prompt's from `start` on; a refusal for others."""
            try:
                positions = self.positions(url, prompt, start)[1:]
                of_ids = [at[token] for at, token in zip(positions, ids[1:], strict=True)]
                for value, _ in of_ids:
                    if type(value) not in (float, int) or not LOWEST <= value <= 0:  # false is an int, NaN in no range
                        raise ValueError(f"{value!r} is no log-probability")
                return np.array(of_ids)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                answer = f"the answer does not hold each of {len(ids)} tokens ({error!r})"
                raise refusal(f"reference.url: {url}, {answer}") from error

        def score(row: Encoded) -> tuple[Float64, Bool]:
            # one token before the response: servers give no log-probability for the first position
            ids, start = row.input_ids.tolist(), max(int(row.target.argmax()) - 1, 0)
            of_tokens = log_probabilities(ids, ids[start:], start, lambda said: DataError(f"{said}, row {row.id}"))
            logprob, highest = of_tokens[row.target[start + 1 :]].T
            return -logprob, highest > 0

        remedy = "serve a model with the tokenizer of the rows, or name the server's as reference.tokenizer"
        log_probabilities(PROBE, tokenizer(PROBE)["input_ids"], 0, lambda said: ConfigError(f"{said}: {remedy}"))
        return score

    def positions(self, url: str, prompt: str | list[int], start: int) -> Positions:
        """Ask for a prompt, a text or ids, and return its positions from `start` on; KeyError for other answers."""
        # [None, {"13": {"logprob": -1.5, "rank": 3}, "7": {"logprob": -0.25, "rank": 1}}]: the token's and the highest
        body = {"model": self.name, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 1}
        logprobs = self.answer(f"{url}/completions", body)["choices"][0]["prompt_logprobs"][start:]
        return [{int(name): (one["logprob"], one["rank"] == 1) for name, one in (at or {}).items()} for at in logprobs]

    def answer(self, url: str, body: dict[str, Any]) -> Any:
        """Return the server's answer to a request, made again if it is busy, fails or is not reached."""
        key = os.environ.get(self.key_variable or "", "EMPTY")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(1 + self.retries):
            time.sleep(min(2.0 ** min(attempt, 9) / 4, LONGEST_PAUSE) if attempt else 0)  # 0, 0.5, 1, 2, ... s
            try:
                with _OPENER.open(request, timeout=TIMEOUT) as response:
                    if len(text := response.read(MOST + 1)) > MOST:
                        raise ValueError(f"it has over {MOST:,} bytes")
                    return json.loads(text)
            except urllib.error.HTTPError as error:  # which is an OSError
                reason = f"answers {error.code}: {error.read(500)!r}"
                if error.code != 429 and error.code < 500:
                    raise ConfigError(f"reference.url: {url} {reason}") from error
            # also an answer that was cut short, or lists in lists in lists
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                reason = f"gives no answer: {error}"
        raise DataError(f"reference.url: {url} {reason} ({1 + self.retries} attempts); the same command goes on")


class FromSGLang(FromEndpoint):
    """A model behind an SGLang server's own API scores every example: `reference.url` is http://HOST:30000.

    It computes log-probabilities of the response alone. As in FromEndpoint they depend a little on its other work.
    """

    def positions(self, url: str, prompt: str | list[int], start: int) -> Positions:
        body = {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": 1,
        }
        about = self.answer(f"{url}/generate", body)["meta_info"]
        # [[None, 5, None], [-1.5, 13, None]] and [None, [[-0.25, 7, None]]]: log-probability, id, text
        both = zip(about["input_token_logprobs"], about["input_top_logprobs"], strict=True)
        return [{token[1]: (token[0], bool(top) and top[0][1] == token[1])} for token, top in both]
