"""Every field of every JSON and YAML file of a model and of a run, with values that no program writes there.

`python -m tests.faults.fuzz` makes a tiny run, changes one field at a time, starts a command on it, and prints for each
file how many commands ended with each exit code. A traceback, a hang and a kill are listed, and so are commands that
end well with other results than on the file as it was: whoever reads them decides whether the result is to be believed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.tiny import Tiny

SECONDS, MEGABYTES = 40, 6_000
"""Most time and address space of one command."""
MOST = 4
"""Elements of a list or an object that are changed: those of a vocabulary are all alike."""
TRACEBACK = 70
"""Exit code of a command that ends in a traceback."""


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "number": 3,
    "true": True,
    "object": {"a": 1},
    "1e40": 10**40,
    "negative": -(10**40),
    "400 digits": 10**400,
    "nan": math.nan,
    "nested": nested(60),
    "deep": nested(400),
    "letters": "a" * 5000,
    "NUL": "a\0b\x1b[2J",
}


class Case(NamedTuple):
    """A file with one field changed.

    field  its path, as `rope_parameters.rope_theta`
    kind   the value that it has instead, by its name in VALUES
    """

    field: str
    kind: str
    content: Any


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that a value holds."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, (key, held) in enumerate(inner):
        most = 4 * MOST if isinstance(held, dict | list) else MOST
        if at < most or not path:
            yield from fields_of(held, (*path, key))


def changed(value: Any, path: Sequence[Any], new: Any) -> Any:
    """A copy of a value with another one at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def cases(content: Any) -> list[Case]:
    """All cases of a file, in a fixed order; a value is left as it is if it has the new one's type and is no number."""
    return [
        Case(".".join(map(str, path)), kind, changed(content, path, new))
        for path in fields_of(content)
        for kind, new in VALUES.items()
    ]


def read(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    if path.suffix == ".jsonl":
        return json.loads(text.splitlines()[0])
    return json.loads(text)


def write(path: Path, content: Any) -> None:
    if path.suffix == ".yaml":
        path.write_text(json.dumps(content).replace("NaN", ".nan"))
        return
    lines = path.read_text().splitlines()[1:] if path.suffix == ".jsonl" else []
    path.write_text("\n".join([json.dumps(content), *lines, ""]))


def ended(words: Sequence[str], output: Path) -> int:
    """Run a command in a fork, and return its exit code; -n: killed by signal n. Its results are in `output`, its notes
    beside it."""
    if child := os.fork():
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if (done := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(done[1])
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = TRACEBACK
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
        with output.open("w") as results, notes_of(output).open("w") as notes:
            os.dup2(results.fileno(), 1)
            os.dup2(notes.fileno(), 2)
            with contextlib.redirect_stdout(results), contextlib.redirect_stderr(notes):
                try:
                    from sftmix.cli import main

                    code = main(list(words))
                except BaseException:
                    traceback.print_exc()
    finally:
        os._exit(code)


def notes_of(output: Path) -> Path:
    return output.with_name("notes")


class Target(NamedTuple):
    """A file to change, below a directory that is copied, and the commands that read it; DIR is the copy."""

    file: str
    commands: tuple[tuple[str, ...], ...]


def fuzz(directory: Path, target: Target, *, every: int, scratch: Path) -> tuple[Counter[str], list[str]]:
    """Run the commands on every n-th case; return how often each exit code came, and lines on what is wrong."""
    codes, wrong = Counter[str](), list[str]()
    copy, output = scratch / "copy", scratch / "output"

    def outcome(words: Sequence[str], content: Any = ...) -> tuple[int, str, str]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        if content is not ...:
            write(copy / target.file, content)
        code = ended([word.replace("DIR", str(copy)) for word in words], output)
        results = re.sub(r"\d+ s\b|\d+:\d\d:\d\d", "TIME", output.read_text(errors="replace"))
        return code, results, notes_of(output).read_text(errors="replace")

    found = cases(read(directory / target.file))
    for words in target.commands:
        usual = outcome(words)
        for at, case in enumerate(found):
            if at % every:
                continue
            code, results, notes = outcome(words, case.content)
            codes[str(code)] += 1
            name = f"{target.file} {case.field} {case.kind}: {words[0]}"
            if code == TRACEBACK or code < 0:
                wrong.append(f"{name} ends with {code}: {notes.strip()[-300:].splitlines()[-1:]}")
            elif code == 0 and results != usual[1] and usual[0] == 0:
                codes["other results"] += 1
                wrong.append(f"{name}: other results")
            if re.search(r"\x1b(?!\[0m)", results + notes):  # that is the end of a colour
                wrong.append(f"{name}: a control character")
    return codes, wrong


MODEL = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
OF_MODEL = (("suspects", "ROWS", "--model", "DIR", "--embedding", "tfidf", "--top", "2"),)
RUN = (
    ("config.yaml", ("status", "report", "export")),
    ("inputs.json", ("report", "export")),
    ("started.json", ("report", "export", "status")),
    ("summary.json", ("report", "status")),
    ("STATUS.json", ("status",)),
    ("train/MANIFEST.json", ("report",)),
    ("train/inputs.json", ("report", "export")),
    ("train/figures.json", ("report",)),
    ("train/metrics.jsonl", ("status", "report")),
    ("train/model/config.json", ("export",)),
    ("confidence/MANIFEST.json", ("report",)),
    ("split/inputs.json", ("report",)),
)
COMMANDS = {
    "status": ("status", "DIR"),
    "report": ("report", "DIR", "--map", "0"),
    "export": ("export", "DIR", "--to", "DIR/../exported"),
}


class _Late(io.TextIOBase):
    """Standard error as it is when something is written: of a command that is the one which shows control characters.

    A command imports libraries when that is in its place; here they are imported before, and keep what they find.
    """

    def write(self, text: str) -> int:
        return sys.stderr.write(text)


def main(every: int = 1, only: str = "") -> list[str]:
    """Run every n-th case of the files with a word in their names, print what came, and return what is wrong."""
    everything = list[str]()
    with contextlib.redirect_stderr(_Late()):
        import pandas  # noqa: F401  here they are only imported: a fork of what has run them may wait for their threads
        import pyarrow.parquet  # noqa: F401
        import sklearn.feature_extraction.text  # noqa: F401
        import torch  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        import sftmix.pipeline.recipe  # noqa: F401

    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(here / "cache")
        program = """
import sys
from pathlib import Path
from sftmix.cli import main
from tests.tiny import make_tiny
tiny = make_tiny(Path(sys.argv[1]))
sys.exit(main(["run", *tiny.options, "--training.max_steps", "2", "--out", sys.argv[1] + "/run"]))
"""
        subprocess.run([sys.executable, "-c", program, place], check=True, capture_output=True)
        tiny = Tiny(here / "model", here / "train.jsonl", here / "eval.jsonl")
        rows = here / "rows.jsonl"
        rows.write_text("".join(tiny.train.read_text().splitlines(keepends=True)[:6]))
        targets = [
            (tiny.model, Target(name, tuple(tuple(w.replace("ROWS", str(rows)) for w in c) for c in OF_MODEL)))
            for name in MODEL
        ]
        targets += [(here / "run", Target(name, tuple(COMMANDS[word] for word in words))) for name, words in RUN]
        for directory, target in targets:
            if only not in target.file or not (directory / target.file).exists():
                print(target.file, "left out", flush=True)
                continue
            (scratch := here / "scratch").mkdir(exist_ok=True)
            codes, wrong = fuzz(directory, target, every=every, scratch=scratch)
            print(target.file, dict(sorted(codes.items())), *wrong, sep="\n  ", flush=True)
            everything += [line for line in wrong if not line.endswith("other results")]
    return everything


if __name__ == "__main__":
    sys.exit("\n".join(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, *sys.argv[2:])) or None)
