"""Every field of every JSON and YAML file of a model and of a run, with values that no program writes there.

`python -m tests.faults.fuzz [N [WORD]]` makes tiny runs, changes one field at a time, starts a command on it, and
prints for each file how many commands ended with each exit code. Manifests fit the changed file: whoever gives a run
away can write them as well. A traceback, a hang and a kill are listed, and so are commands that end well with other
results than on the file as it was: whoever reads them decides whether the result is to be believed.

N     every n-th case
WORD  files with the word in their names, as `run/train`
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import math
import os
import pkgutil
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

import sftmix
from sftmix.disk.files import MANIFEST, file_entry, hashed, write_json
from sftmix.disk.hashes import sha256_file
from tests.tiny import Tiny

SECONDS, MEGABYTES = 40, 6_000
"""Most processor time and address space of one command."""
WAITED = 400
"""Most seconds until it ends, on a machine with other work."""
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
    if path.suffix == ".jinja":
        return {"whole": text}
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    if path.suffix == ".jsonl":
        return json.loads(text.splitlines()[0])
    return json.loads(text)


def write(path: Path, content: Any) -> None:
    if path.suffix == ".jinja":
        path.write_text(str(content["whole"]))
        return
    if path.suffix == ".yaml":
        path.write_text(json.dumps(content).replace("NaN", ".nan"))
        return
    lines = path.read_text().splitlines()[1:] if path.suffix == ".jsonl" else []
    path.write_text("\n".join([json.dumps(content), *lines, ""]))


def refit(directory: Path, file: Path) -> None:
    """Let the manifests below a directory have the hash of a file, and their own hashes."""
    for manifest in sorted(directory.rglob(MANIFEST)):
        kept = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "sha256"}
        if manifest == file:
            write_json(manifest, hashed(kept))
        for name in kept["files"] if manifest != file else ():
            if os.path.normpath(manifest.parent / name) == str(file):
                kept["files"][name] = file_entry(file)
                write_json(manifest, hashed(kept))


def ended(words: Sequence[str], output: Path) -> int:
    """Run a command in a fork, and return its exit code; -n: killed by signal n. Its results are in `output`, its notes
    beside it."""
    if child := os.fork():
        end = time.monotonic() + WAITED
        while time.monotonic() < end:
            if (done := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(done[1])
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = TRACEBACK
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
        with output.open("w") as results, notes_of(output).open("w") as notes:
            os.dup2(results.fileno(), 1)
            os.dup2(notes.fileno(), 2)
            with contextlib.redirect_stdout(results), contextlib.redirect_stderr(notes):
                tempfile.tempdir = str(output.parent)  # which the caller removes: nothing is tidied at this end
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

    directory: Path
    file: str
    commands: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.directory.name}/{self.file}"


def fuzz(target: Target, *, every: int, scratch: Path) -> tuple[Counter[str], list[str]]:
    """Run the commands on every n-th case; return how often each exit code came, and lines on what is wrong."""
    codes, wrong = Counter[str](), list[str]()
    copy, output = scratch / "copies" / "copy", scratch / "output"

    def outcome(words: Sequence[str], content: Any = ...) -> tuple[int, str, str]:
        shutil.rmtree(copy.parent, ignore_errors=True)  # with what the command before has made beside it
        shutil.copytree(target.directory, copy)
        if content is not ...:
            write(copy / target.file, content)
            refit(copy, copy / target.file)
        code = ended([word.replace("DIR", str(copy)) for word in words], output)
        trained = sorted(copy.glob("train/model/*.safetensors")) if words[0] == "run" else []
        results = output.read_text(errors="replace") + " ".join(map(sha256_file, trained))
        return code, re.sub(r"\d+ s\b|\d+:\d\d:\d\d", "TIME", results), notes_of(output).read_text(errors="replace")

    found = cases(read(target.directory / target.file))
    for words in target.commands:
        usual = outcome(words)
        if usual[0]:
            wrong.append(f"{target.name}: {words[0]} ends with {usual[0]} on the file as it was: {usual[2][-300:]}")
        for at, case in enumerate(found):
            if at % every:
                continue
            code, results, notes = outcome(words, case.content)
            codes[str(code)] += 1
            name = f"{target.name} {case.field} {case.kind}: {words[0]}"
            if code == TRACEBACK or code < 0:
                wrong.append(f"{name} ends with {code}: {notes.strip()[-300:].splitlines()[-1:]}")
            elif code == 0 and results != usual[1] and usual[0] == 0:
                codes["other results"] += 1
                wrong.append(f"{name}: other results")
            if re.search(r"\x1b(?!\[[\d;]*m)", results + notes):  # that is a colour
                wrong.append(f"{name}: a control character")
    return codes, wrong


FILES = (
    ("model/config.json", "score"),
    ("model/generation_config.json", "score", "answer"),
    ("model/tokenizer_config.json", "score"),
    ("model/tokenizer.json", "score"),
    ("other/special_tokens_map.json", "score"),
    ("other/added_tokens.json", "score"),
    ("model/chat_template.jinja", "score", "answer"),
    ("other/model.safetensors.index.json", "score"),
    ("adapters/adapter_config.json", "answer"),
    ("run/config.yaml", "status", "report", "trusting", "export", "verify", "preview", "again"),
    ("run/started.json", "status", "report", "trusting", "export", "verify"),
    ("run/STATUS.json", "status"),
    ("run/summary.json", "status", "report", "export"),
    ("run/reference/inputs.json", "verify"),
    ("run/reference/figures.json", "report", "verify"),
    ("run/reference/metrics.jsonl", "status", "report"),
    ("run/confidence/MANIFEST.json", "report"),
    ("run/split/inputs.json", "report"),
    ("run/split/figures.json", "report"),
    ("run/split/confounds.json", "report"),
    ("run/base/figures.json", "report"),
    ("run/train/MANIFEST.json", "report", "export"),
    ("run/train/inputs.json", "report", "export", "verify"),
    ("run/train/figures.json", "report", "verify"),
    ("run/train/calibration.json", "report"),
    ("run/train/metrics.jsonl", "status", "report", "verify"),
    ("run/train/model/config.json", "export", "answer"),
    ("run/train/model/tokenizer_config.json", "export"),
    ("run/train/checkpoints/step-00000001/MANIFEST.json", "verify", "checkpoint"),
    ("run/train/checkpoints/step-00000001/state.json", "verify", "checkpoint"),
    ("run/train/checkpoints/step-00000001/optimizer.json", "verify"),
    ("half/config.yaml", "continue"),
    ("half/started.json", "continue"),
    ("half/STATUS.json", "continue"),
    ("half/reference/MANIFEST.json", "continue"),
    ("half/reference/figures.json", "continue"),
    ("half/reference/inputs.json", "continue"),
    ("half/confidence/inputs.json", "continue"),
    ("half/split/figures.json", "continue"),
    ("half/split/inputs.json", "continue"),
    ("half/base/figures.json", "continue"),
    ("half/train/inputs.json", "continue"),
    ("half/train/metrics.jsonl", "continue"),
    ("half/train/checkpoints/step-00000001/MANIFEST.json", "continue"),
    ("half/train/checkpoints/step-00000001/state.json", "continue"),
    ("half/train/checkpoints/step-00000001/optimizer.json", "continue"),
    ("table/compare.yaml", "status", "table"),
    ("table/table.json", "status", "table"),
    ("table/ntp/seed-1/base/adopted.json", "table"),
)
"""What is changed, and the commands that read it. In half/ the training has made one step of two."""
COMMANDS = {
    "score": ("suspects", "ROWS", "--model", "DIR", "--embedding", "tfidf", "--top", "2"),
    "answer": ("generate", "DIR", "--prompts", "ROWS", "--to", "DIR/../answers", "--max_new_tokens", "2"),
    "status": ("status", "DIR"),
    "report": ("report", "DIR", "--map", "0"),
    "trusting": ("report", "DIR", "--map", "0", "--trust"),
    "export": ("export", "DIR", "--to", "DIR/../exported"),
    "checkpoint": ("export", "DIR", "--to", "DIR/../exported", "--step", "1"),
    "verify": ("verify", "DIR", "--steps", "1", "--trust"),
    "preview": ("preview", "--config", "DIR/config.yaml", "--trust"),
    "again": ("run", "--config", "DIR/config.yaml", "--out", "DIR/../again", "--trust"),
    "table": ("report", "DIR"),
}

MAKE = """
import json, shutil, sys
from pathlib import Path
from safetensors import safe_open
from sftmix.cli import main
from sftmix.disk.files import read_json, write_json
from tests.tiny import make_tiny

here = Path(sys.argv[1])
tiny = make_tiny(here)
other = shutil.copytree(tiny.model, here / "other")
tokens = {name: value for name, value in read_json(other / "tokenizer_config.json").items() if name.endswith("_token")}
write_json(other / "special_tokens_map.json", {**tokens, "additional_special_tokens": ["<|user|>"]})
write_json(other / "added_tokens.json", {"<|user|>": 4})
shard = (other / "model.safetensors").rename(other / "model-00001-of-00001.safetensors")
shards = dict.fromkeys(safe_open(shard, "pt").keys(), shard.name)
write_json(other / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": shards})
options = [*tiny.options, "--training.max_steps", "2", "--checkpoint.every", "1"]
assert main(["run", *options, "--out", str(here / "run")]) == 0
shutil.copytree(here / "run", here / "half")
(here / "half" / "train" / "MANIFEST.json").unlink()
shutil.rmtree(here / "half" / "train" / "checkpoints" / "step-00000002")
assert main(["run", *options, "--model.lora.r", "2", "--out", str(here / "lora")]) == 0
shutil.copytree(here / "lora" / "train" / "model", here / "adapters")
(here / "table.yaml").write_text(json.dumps({"variants": {"sftmix": {}, "ntp": {"objective": "NTP"}}}))
table = ["compare", "--config", str(here / "table.yaml"), *options, "--seeds", "[1,2]", "--out", str(here / "table")]
assert main(table) == 0
"""


LIBRARIES = (
    "pandas",
    "peft",
    "plotly.graph_objects",
    "pyarrow.parquet",
    "sklearn.decomposition",
    "sklearn.feature_extraction.text",
    "torch",
    "transformers.models.llama.modeling_llama",
)
"""What commands import."""


class _Late(io.TextIOBase):
    """Standard error as it is when something is written: of a command that is the one which shows control characters.

    A command imports libraries when that is in its place; here they are imported before, and keep what they find.
    """

    def write(self, text: str) -> int:
        stream = sys.__stderr__ if sys.stderr is self else sys.stderr  # what is said while they are imported
        return stream.write(text) if stream else 0


def targets(here: Path) -> Iterator[Target]:
    """The files to change, with the commands that read them."""
    tiny = Tiny(here / "model", here / "train.jsonl", here / "eval.jsonl")
    rows = here / "rows.jsonl"
    rows.write_text("".join(tiny.train.read_text().splitlines(keepends=True)[:6]))
    goes_on = ("run", *tiny.options, "--training.max_steps", "2", "--checkpoint.every", "1", "--out", "DIR")
    commands = {**COMMANDS, "continue": goes_on}
    for name, *words in FILES:
        directory, _, file = name.partition("/")
        of_it = (tuple(word.replace("ROWS", str(rows)) for word in commands[command]) for command in words)
        yield Target(here / directory, file, tuple(of_it))


def main(every: int = 1, only: str = "") -> list[str]:
    """Run every n-th case of the files with a word in their names, print what came, and return what is wrong."""
    everything = list[str]()
    with contextlib.redirect_stderr(_Late()):
        ours = (module.name for module in pkgutil.walk_packages(sftmix.__path__, "sftmix."))
        # Once for all, and not run: a fork of what has run them may wait for their threads.
        for name in (*LIBRARIES, *(name for name in ours if not name.endswith("__main__"))):
            with contextlib.suppress(ImportError):  # of what only other machines have
                importlib.import_module(name)
    gc.freeze()  # else each command looks through all of them

    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(here / "cache")
        subprocess.run([sys.executable, "-c", MAKE, place], check=True, capture_output=True)
        for target in targets(here):
            if only not in target.name:
                continue
            (scratch := here / "scratch").mkdir(exist_ok=True)
            codes, wrong = fuzz(target, every=every, scratch=scratch)
            print(target.name, dict(sorted(codes.items())), *wrong, sep="\n  ", flush=True)
            everything += [line for line in wrong if not line.endswith("other results")]
    return everything


if __name__ == "__main__":
    sys.exit("\n".join(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, *sys.argv[2:])) or None)
