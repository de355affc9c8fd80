"""Names that lead elsewhere: nothing is written outside the run directory, no URL is ever fetched, and no file of the
working directory runs because a library looks for a package of its name.
"""

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sftmix.data.sources import name_parts
from sftmix.disk.places import HUB_ID
from sftmix.disk.tables import read_columns, write_table
from sftmix.words.errors import ConfigError
from tests.configs import read_config
from tests.fast import some_fast
from tests.faults.runs import long
from tests.tiny import ROOT

NAMES = {
    "URL": "https://example.com/x",
    "S3": "s3://bucket/x",
    "hub URL": "hf://datasets/a/b",
    "NUL": "a\0b",
    "newline": "a\nb",
    "long": "a" * 300,
    "passwd": "../" * 40 + "etc/passwd",  # from any depth: above the root is the root
    "absolute": "/etc/passwd",
    "up": "../../x",
    "home": "~/x",
    "other home": "~nobody/../x",
    "link": "link/x",
    "empty part": "a//b/../c/d",
}
READ = {"--data.train": 3, "--model.path": 2, "--reference.model.path": 2, "--data.template": 2}
"""Options that name what is read, and the exit code where it is not there."""
_URL, _CONTROL = "is a URL", "holds a control character"
REFUSED = {"URL": _URL, "S3": _URL, "hub URL": _URL, "NUL": _CONTROL, "newline": _CONTROL}
REFUSED["long"] = "has a part of more than 200 bytes"
"""The names that no place to write has, and why."""


@pytest.fixture
def no_network(monkeypatch):
    """Every try to find a host is noted, and fails."""
    asked: list[object] = []

    def refuse(*where: object, **_: object) -> None:
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


@dataclass(frozen=True)
class Around:
    """A working directory and what lies around it, all of it watched: above it, a home, behind a link."""

    top: Path
    here: Path

    def tree(self) -> dict[str, int]:
        paths = [path for path in self.top.rglob("*") if path != self.here]
        return {str(path.relative_to(self.top)): path.lstat().st_mtime_ns for path in paths}


@pytest.fixture
def around(tmp_path, monkeypatch) -> Around:
    """The working directory is `here`, three levels down; ~ is a home; here/link leads to `behind`."""
    here = tmp_path / "above" / "middle" / "here"
    for made in (here, tmp_path / "home", tmp_path / "behind"):
        made.mkdir(parents=True)
    (here / "link").symlink_to(tmp_path / "behind")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(here)
    return Around(tmp_path, here)


@pytest.mark.parametrize("option", some_fast(READ, every=2))
def test_what_is_read_is_there_or_refused(option, finished, around, no_network, sftmix):
    given = {"--model.path": str(finished.tiny.model), "--data.train": str(finished.tiny.train), "--out": "run"}
    for kind, name in NAMES.items():
        before = around.tree()
        words = [word for pair in (given | {option: name}).items() for word in pair]
        done = sftmix("reference", *words, "--reference.checkpoints", "2", "--training.max_steps", "2")
        assert done.code == READ[option], (kind, done.err)
        changed = around.tree().items() - before.items()
        assert all(path.startswith("above/middle/here/run") for path, _ in changed), (kind, changed)


def refused(commands, reason: str, around: Around, sftmix) -> None:
    before = around.tree()
    for words in commands:
        done = sftmix(*words)
        assert done.code == 2, (words, done.err)
        assert reason in done.err
        assert "Traceback" not in done.err
    assert around.tree() == before


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_written_has_a_name_that_can_be_seen(kind, finished, around, no_network, sftmix):
    run, name = str(finished.path), NAMES[kind]
    commands = (
        ["run", *finished.tiny.options, "--out", name],
        ["quickstart", "--out", name],
        ["export", run, "--to", name],
        ["report", run, "--to", name],
        ["generate", run, "--to", name],
        ["evaluate", run, "--tasks", "arc_easy", "--to", name],
    )
    refused(commands, REFUSED[kind], around, sftmix)


@pytest.mark.parametrize("kind", ["URL", "NUL", "long", "passwd", "absolute"])
def test_a_run_of_that_name_is_not_there_and_none_is_made(kind, finished, around, no_network, sftmix):
    commands = (
        ["run", *finished.tiny.options, "--out", NAMES[kind]],
        ["export", str(finished.path), "--to", NAMES[kind]],
        ["export", NAMES[kind], "--to", "exported"],
        ["status", NAMES[kind]],
    )
    refused(commands, "", around, sftmix)


@pytest.mark.parametrize(
    ("name", "place"),
    [("../up", "above/middle/up"), ("link/model", "behind/model"), ("~/model", "home/model")],
)
def test_what_is_written_is_in_the_place_that_was_named(name, place, finished, around, sftmix):
    """A link is followed, because it was named; ~ is the home, as in what is read, also where no shell replaces it."""
    before = around.tree()
    assert sftmix("export", str(finished.path), "--merge", "--to", name).code == 2  # there are no adapters
    assert around.tree() == before
    assert sftmix("export", str(finished.path), "--to", name).code == 0
    changed = around.tree().items() - before.items()
    changed = {path for path, _ in changed} - {*map(str, Path(place).parents)}
    assert place in changed
    assert all(path.startswith(place) for path in changed), changed


def test_a_run_directory_that_looks_like_a_url_is_read_as_files(tmp_path, monkeypatch, no_network):
    """A table is opened as a file: of a name pyarrow would make a file system of its own."""
    monkeypatch.chdir(tmp_path)
    place = Path("s3:/bucket") / "confidence.parquet"
    place.parent.mkdir(parents=True)
    write_table(place, ["a"])
    assert read_columns(place, "id")["id"] == ["a"]


NO_HUB_IDS = ["a/b@../../x", "a/b@x/y", "a/b:../x@train", "a/b:..@train", "a/b:x\n@train", "a/b@train\n", "a/b\n"]
NO_HUB_IDS += ["../b", "a/..", "a/b@.", "a\0b", "a/b:\0", "https://a/b"]


@pytest.mark.parametrize("name", NO_HUB_IDS)
def test_no_hub_id(name):
    assert not HUB_ID.match(name_parts(name)[0])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b@train[:50%]", ("a/b", None, "train[:50%]")),
        ("a/b:main@train[10:20]+test", ("a/b", "main", "train[10:20]+test")),
        ("a/b:20220301.en", ("a/b", "20220301.en", None)),
        ("squad@train_sft[:10%](pct1_dropremainder)", ("squad", None, "train_sft[:10%](pct1_dropremainder)")),
    ],
)
def test_hub_ids(name, parts):
    assert name_parts(name) == parts
    assert HUB_ID.match(parts[0])


OPTIONAL = ("kernels", "bitsandbytes", "hqq", "fla", "flash_attn", "optimum", "gptqmodel", "aqlm", "argcomplete", "av")
"""Packages that transformers and peft look for; most are not installed."""
OWN = """
import my_words

from sftmix.components import Callback


class Mine(Callback):
    def on_stage_end(self, state):
        import my_ending  # when it runs, long after the options were read

        print(my_words.BEGINNING + my_ending.ENDING)
"""


@pytest.fixture
def elsewhere(tiny, tmp_path) -> Iterator[Path]:
    """A model's directory with a program under the name of each optional package; at the end none of them ran."""
    ran = tmp_path / "ran"
    for name in OPTIONAL:
        (tiny.model / f"{name}.py").write_text(f"print({name!r}, file=open({str(ran)!r}, 'a'))\n__version__ = '99.0'\n")
    yield tiny.model
    assert not ran.exists(), ran.read_text()


def command(*words: str, cwd: Path, module: bool = False) -> subprocess.CompletedProcess[str]:
    """The console script, or `python -m sftmix`, in `cwd`; this package is on PYTHONPATH."""
    start = ["-c", "import sys; sys.path.remove(''); from sftmix.cli import main; sys.exit(main())"]
    if module:
        start = ["-m", "sftmix"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *start, *words]
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, input="")


def short(tiny, *, out: Path) -> list[str]:
    words = [*tiny.options, "--training.max_steps", "2", "--checkpoint.every", "0", "--objective", "NTP"]
    return ["run", *words, "--out", str(out)]


RARE = [("preview", True), ("run", False), ("run", True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "module"), [("chat", False), *(pytest.param(*each, marks=pytest.mark.long) for each in RARE)]
)
def test_nothing_in_the_working_directory_runs(kind, module, tiny, elsewhere, tmp_path):
    words = {
        "preview": ["preview", "--model.path", ".", "--data.train", str(tiny.train)],
        "chat": ["chat", "."],
        "run": short(tiny, out=tmp_path / "run"),
    }
    done = command(*words[kind], cwd=elsewhere, module=module)
    assert done.returncode == 0, done.stderr


def test_the_directory_is_searched_for_a_class_that_is_named_alone(tmp_path, monkeypatch, sftmix):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_only_part.py").write_text("from sftmix.components import NTP\n\nclass Mine(NTP):\n    pass\n")
    assert sftmix("components", "SFTMix").code == sftmix("run", "--splitter", "Median", "--print_config").code == 0
    assert sftmix("components", "no_such_part.Mine").code == 2
    assert str(tmp_path) not in sys.path
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("my_only_part")
    assert sftmix("components", "my_only_part.Mine").code == 0
    assert sys.path[-1] == str(tmp_path)


MINE = "from sftmix.components import Median\n\nclass Mine(Median):\n    pass\n"


@pytest.mark.parametrize(
    ("inside", "name"),
    [
        ("a/run", "evil_in_a_run"),
        ("a/run/train", "evil_in_a_stage"),
        ("a", "run.evil_in_a_run"),
        (".", "a.run.evil_in_a_run"),
        ("a", "beside_a_run"),
        (".", "a_package.beside_a_run"),
    ],
)
def test_a_run_directory_brings_no_classes(inside, name, tmp_path, monkeypatch):
    """Its config.yaml names one, and the command is given in the directory or around it; but by one's own will."""
    for path in ("a/run/evil_in_a_run", "a/run/train/evil_in_a_stage", "a/beside_a_run", "a_package/beside_a_run"):
        file = tmp_path / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(MINE)
    (tmp_path / "a" / "run" / "config.yaml").write_text(f"splitter: {name}.Mine\n")
    monkeypatch.chdir(tmp_path / inside)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = os.path.relpath(tmp_path / "a" / "run" / "config.yaml")
    with pytest.raises(ConfigError, match=f"{name}.Mine is no component of this package"):
        read_config(path)
    assert os.getcwd() not in sys.path
    for words in (["--trust"], ["--splitter", f"{name}.Mine"]):
        assert type(read_config(path, *words).splitter).__name__ == "Mine"


@long
def test_a_class_of_ones_own_may_import_what_lies_beside_it(tiny, tmp_path):
    """At once and when it runs."""
    (tmp_path / "my_callback.py").write_text(OWN)
    (tmp_path / "my_words.py").write_text("BEGINNING = 'the begin'")
    (tmp_path / "my_ending.py").write_text("ENDING = 'ning and the end'")
    words = [*short(tiny, out=tmp_path / "run"), "--callbacks+", "my_callback.Mine"]
    done = command(*words, cwd=tmp_path, module=True)
    assert done.returncode == 0, done.stderr
    assert "the beginning and the end" in done.stdout
