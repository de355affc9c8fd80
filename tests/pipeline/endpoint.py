"""A local server that scores prompts by a real model, in the formats of vLLM's completions and of SGLang's own API.

`with Server(model) as server:` serves on a port of its own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Server:
    """answered: the ids of every prompt that got its log-probabilities, texts left out.

    faults  for the next requests for ids, one each: a status that is answered in place of 200, "drop" for a connection
            that ends in the middle of the answer
    change  is called with every list of positions before it is sent
    key     that requests must bring
    """

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.answered: list[tuple[int, ...]] = []
        self.faults: list[int | str] = []
        self.change: Callable[[list[Any]], list[Any] | None] = lambda positions: positions
        self.key: str | None = None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def ids(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def scores(self, ids: list[int]) -> list[dict[int, tuple[float, int]] | None]:
        """Log-probability and rank of the own and of the highest id at each position but the first."""
        with torch.no_grad():
            logp = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)
        each: list[dict[int, tuple[float, int]] | None] = [None]
        for own, at in zip(ids[1:], logp[:-1], strict=True):
            top = int(at.argmax())
            each.append({top: (float(at[top]), 1), own: (float(at[own]), 1 + int((at > at[own]).sum()))})
        return each

    def vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 1)
        positions = [
            at and {str(i): {"logprob": logprob, "rank": rank} for i, (logprob, rank) in at.items()}
            for at in self.scores(self.ids(body["prompt"]))
        ]
        return {"choices": [{"text": "x", "prompt_logprobs": self.change(positions)}]}

    def sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["return_logprob"]
        ids, start = self.ids(body.get("text") or body["input_ids"]), body["logprob_start_len"]
        each = list(zip(ids, self.scores(ids), strict=True))[start:]
        own = [[None if k == 0 or at is None else at[i][0], i, None] for k, (i, at) in enumerate(each)]
        top = [
            None if one[0] is None else [[*next(iter(at.items()))[::-1], None]]
            for one, (_, at) in zip(own, each, strict=True)
        ]
        return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


class _Handler(BaseHTTPRequestHandler):
    """Answers for a server, which a subclass names."""

    server_of: Server

    def do_POST(self) -> None:
        server, body = self.server_of, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body.get("prompt") or body.get("text") or body["input_ids"]
        with server.lock:
            fault = server.faults.pop(0) if server.faults and not isinstance(prompt, str) else 200
            if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                fault = 401
            answer = {"/v1/completions": server.vllm, "/generate": server.sglang}[self.path](body)
            data = json.dumps(answer if fault in (200, "drop") else {"error": "no"}).encode()
            if fault == 200 and not isinstance(prompt, str):
                server.answered.append(tuple(prompt))
        self.send_response(200 if fault == "drop" else int(fault))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)

    def log_message(self, *words: object) -> None:
        """Say nothing."""
