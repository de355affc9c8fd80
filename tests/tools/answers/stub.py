"""A judge on this machine: an OpenAI-compatible server whose verdict is a function of what it is asked.

`python tests/tools/answers/stub.py PORT` serves until it is ended; tests start it in a thread.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Judge(BaseHTTPRequestHandler):
    """Answers chat completions: the letter m or M to alpaca_eval's judge, `Rating: [[n]]` to FastChat's."""

    server: Server

    def do_POST(self) -> None:
        """Answer one request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(completion(asked, self.server.times(asked))).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


def text_of(asked: dict[str, Any]) -> str:
    """Return all that is asked, as one text."""
    return "\n".join(str(message["content"]) for message in asked["messages"])


def completion(asked: dict[str, Any], times: int = 0) -> dict[str, Any]:
    """Return a chat completion. It depends on what is asked, and on how often this was asked: judges waver."""
    text = text_of(asked)
    draw = zlib.crc32(f"{times}: {text}".encode())
    rates = re.search(r"\[\[rating\]\]", text) is not None
    content = f"It says something. Rating: [[{1 + draw % 10}]]" if rates else "mM"[draw % 2]
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    if asked.get("logprobs"):
        other = "M" if content == "m" else "m"
        top = [{"token": t, "logprob": p, "bytes": None} for t, p in ((content, -0.1), (other, -2.35))]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    usage = {"prompt_tokens": len(text) // 4, "completion_tokens": 1, "total_tokens": len(text) // 4 + 1}
    kind = {"id": f"stub-{draw}", "object": "chat.completion", "created": 0, "model": asked["model"]}
    return {**kind, "choices": [choice], "usage": usage}


class Server(ThreadingHTTPServer):
    """The server with all that it was asked."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Judge)
        self.requests: list[dict[str, Any]] = []
        self._times = Counter[str]()
        self._lock = threading.Lock()

    def times(self, asked: dict[str, Any]) -> int:
        """Keep a request, and return how often the same was asked before."""
        with self._lock:
            self.requests.append(asked)
            self._times[text_of(asked)] += 1
            return self._times[text_of(asked)] - 1


@contextmanager
def judge() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve while the block runs; yield the base URL and the requests so far."""
    server = Server(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", server.requests
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    Server(int(sys.argv[1])).serve_forever()
