"""A trial of a chat template in a process of its own, with bounds on time and memory.

A template comes with a model, so its author may be anyone. Jinja's sandbox keeps it from files and programs, but not
from loops without end, nor from texts that fill the memory. `trouble_with` runs this file as the process's program.
"""

import contextlib
import itertools
import json
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECONDS = 2
"""Processor time of the trial."""
MEGABYTES = 512
"""Memory of the trial, on top of what the program itself takes."""
LETTERS = 1 << 20
"""Most characters that it may write for a conversation of at most five short turns."""

_TURNS = [("system", "Be short."), ("user", "Name a colour."), ("assistant", "Blue"), ("user", "And now?")]
_CHAT = [{"role": role, "content": content} for role, content in [*_TURNS, ("assistant", "Green")]]
SYSTEM, PROBE, AND_NOW = _CHAT[:1], _CHAT[1:3], _CHAT[3]
"""A system turn; a user and an assistant turn, to which templates are fitted; and a second question."""
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00000", "type": "function", "function": {"name": "find_colour", "arguments": {"when": "noon"}}}
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_colour",
            "description": "Find a colour.",
            "parameters": {
                "type": "object",
                "properties": {"when": {"type": "string", "description": "The time of day."}},
                "required": ["when"],
            },
        },
    }
]
RESULT = {"role": "tool", "name": "find_colour", "tool_call_id": "call00000", "content": "Red"}
"""A call of a function, the list of functions that has it, and what the function returns."""
_THOUGHT: dict[str, Any] = {**PROBE[1], **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "Sky")}
_INLINE = {**PROBE[1], "content": "<think>\nSky\n</think>\n\nBlue"}


def with_text_arguments(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn whose calls have their arguments as JSON text."""
    calls = []
    for call in turn["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    PROBE[:1],
    PROBE,
    _CHAT,
    _CHAT[1:],
    _CHAT[:2],
    [PROBE[0], CALL, RESULT],
    [PROBE[0], with_text_arguments(CALL), RESULT],
    [PROBE[0], _THOUGHT],
    [PROBE[0], _INLINE],
    [PROBE[0], {**_THOUGHT, **CALL}],
]
"""What is rendered of rows: turns, a system turn, calls with arguments as an object or as text, results, thoughts in
fields or in tags; contents also as lists of parts, and also with a word that no template knows before."""


def as_parts(content: str) -> list[dict[str, str]]:
    """Return a content as the list of parts that some templates take alone."""
    return [{"type": "text", "text": content}]


def trouble_with(template: str, variables: dict[str, str]) -> str | None:
    """Render small conversations in another process; return why the template must not be used, or None.

    A template that raises an error is no trouble: it will raise it again, for a message that says more. Many do so on
    a system turn: the other conversations are tried all the same.

    variables  the tokenizer's special tokens by name, which the template may write
    """
    if len(template) > LETTERS:
        return f"it has {len(template):,} characters; at most {LETTERS:,} are allowed"
    request = json.dumps({"template": template, "variables": variables})
    program = [sys.executable, "-P", __file__]  # the modules beside this file have names of their own
    done = subprocess.run(program, input=request, capture_output=True, text=True)
    if done.returncode == 0:  # -9: too much time (SIGKILL on Linux); 1: MemoryError
        return None
    end = done.stderr.strip().rpartition("\n")[2]
    return (
        f"it takes more than {SECONDS} s of processor time, {MEGABYTES} MB of memory or {LETTERS:,} characters for a "
        f"short conversation, or cannot be tried out (exit code {done.returncode}, {end or 'killed'})"
    )


def _main() -> None:
    """Render the conversations of the trial within the bounds: SECONDS and MEGABYTES more than were used before."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request = json.load(sys.stdin)
    render_jinja_template([CONVERSATIONS[0]], chat_template="{{ messages }}")  # imports what it needs
    with contextlib.suppress(ImportError, FileNotFoundError):  # Windows has no such bounds, macOS none on memory
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        pages = int(Path("/proc/self/statm").read_text().split()[0])  # the address space, as RLIMIT_AS counts it
        size = pages * resource.getpagesize() + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    word = secrets.token_hex(4)
    texts = [[{**turn, "content": f"{turn['content']} {word}"} for turn in chat] for chat in CONVERSATIONS]
    texts += CONVERSATIONS
    listed = [[{**turn, "content": as_parts(turn["content"])} for turn in chat] for chat in texts]
    for chat, prompt, tools in itertools.product(texts + listed, (False, True), (None, TOOLS)):
        options = {"chat_template": request["template"], "add_generation_prompt": prompt, "tools": tools}
        try:
            written = render_jinja_template([chat], **options, **request["variables"])[0]  # beside places not asked for
        except MemoryError:  # which is an Exception
            raise
        except Exception:  # any error of a template; the caller meets it again
            continue
        if len(written[0]) > LETTERS:
            raise MemoryError


if __name__ == "__main__":
    _main()
