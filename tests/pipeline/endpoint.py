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


class Server(ThreadingHTTPServer):
    """answered: the ids of every prompt that got its log-probabilities, texts left out.

    faults  for the next requests for ids, one each: a status that is answered in place of 200, "drop" for a connection
            that ends in the middle of the answer
    change  is called with every list of positions before it is sent
    key     that requests must bring
    """

    key: str | None = None

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
        threading.Thread(target=self.serve_forever, daemon=True).start()
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
            if fault == 200 and not is_text:
                server.answered.append(tuple(prompt))
        self.send_response(200 if fault == "drop" else int(fault))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)

    def log_message(self, *words: object) -> None:
        """Say nothing."""
