"""A trial of a chat template in a process of its own, with bounds on time and memory.

A template comes with a model, so its author may be anyone. Jinja's sandbox keeps it from files and programs, but not
from loops without end, nor from texts that fill the memory. `trouble_with` runs this file as the process's program.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SECONDS = 2
"""Processor time of the trial."""
MEGABYTES = 512
"""Memory of the trial, on top of what the program itself takes."""
LETTERS = 1 << 20
"""Most characters of a template, and of what it may write for a conversation of four short turns."""

_TURNS = [("system", "Be short."), ("user", "Name a colour."), ("assistant", "Blue"), ("user", "And now?")]
_CHAT = [{"role": role, "content": content} for role, content in [*_TURNS, ("assistant", "Green")]]
SYSTEM, PROBE = _CHAT[:1], _CHAT[1:3]
"""A system turn; and a user and an assistant turn, to which templates are fitted."""
CONVERSATIONS = [PROBE[:1], PROBE, _CHAT, _CHAT[1:], _CHAT[:2]]


def trouble_with(template: str, variables: Mapping[str, str]) -> str | None:
    """Render small conversations in another process; return why the template must not be used, or None.

    A template that raises an error is no trouble: it will raise it again, for a message that tells more. Many do so on
    a system turn: the other conversations are tried all the same.

    variables  the tokenizer's special tokens by name, which the template may write
    """
    if len(template) > LETTERS:
        return f"it has {len(template):,} characters, and the limit is {LETTERS:,}"
    request = json.dumps({"template": template, "variables": dict(variables)})
    program = [sys.executable, "-P", __file__]  # the modules beside this file have names of their own
    try:
        done = subprocess.run(program, input=request, capture_output=True, text=True)
    except OSError as error:
        return f"it cannot be tried out: no Python process can be started: {error}"
    if done.returncode < 0:
        return f"it needs more than {SECONDS} s of processor time for a short conversation"
    if done.returncode:
        return "it cannot be tried out: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout.splitlines()[-1] or None  # before it stands what others print when Python starts


def _main() -> None:
    """Render the conversations of the trial within the bounds; print what is wrong with the template, or nothing."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request = json.load(sys.stdin)
    render_jinja_template([CONVERSATIONS[0]], chat_template="{{ messages }}")  # imports what it needs
    with suppress(ImportError):
        _bound()
    trouble = ""
    for chat, prompt in itertools.product(CONVERSATIONS, (False, True)):
        with suppress(Exception):  # any error of a template; the caller meets it again
            try:
                texts = render_jinja_template(  # a list, and places that are not asked for
                    [chat], chat_template=request["template"], add_generation_prompt=prompt, **request["variables"]
                )[0]
            except MemoryError:
                trouble = f"it needs more than {MEGABYTES} MB of memory for a short conversation"
                break
            if len(texts[0]) > LETTERS:
                trouble = f"it writes {len(texts[0]):,} characters for a short conversation"
    print(trouble)


def _bound() -> None:
    """Bound the rest of this process: SECONDS and MEGABYTES more than it has used. Windows knows no such bounds."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere the bound on memory does not work
        size = int(status.read_text().split()[0]) * resource.getpagesize() + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _main()
