"""A judge on this machine: an OpenAI-compatible server whose verdict is a function of what it is asked.

`python tests/tools/answers/stub.py PORT` serves until it is ended.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TIMES = Counter[str]()
"""How often each text was asked."""


class Judge(BaseHTTPRequestHandler):
    """Answers chat completions: the letter m or M to alpaca_eval's judge, `Rating: [[n]]` to FastChat's."""

    def do_POST(self) -> None:
        """Answer one request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(completion(asked, TIMES)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


def completion(asked: dict[str, Any], times: Counter[str]) -> dict[str, Any]:
    """Return a chat completion. It depends on what is asked, and on how often this was asked: judges waver."""
    text = "\n".join(str(message["content"]) for message in asked["messages"])
    draw = zlib.crc32(f"{times[text]}: {text}".encode())
    times[text] += 1
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


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Judge).serve_forever()
