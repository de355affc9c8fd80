"""A working directory from elsewhere: no file in it runs because a library looks for a package of its name."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sftmix.common.errors import ConfigError
from sftmix.config.read import read_config
from tests.faults.runs import long
from tests.tiny import ROOT

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


def command(*words: str, cwd: Path, ranks: int = 1, module: bool = False) -> subprocess.CompletedProcess[str]:
    """The console script, `python -m sftmix` or ranks of torchrun in `cwd`; this package is on PYTHONPATH."""
    start = ["-c", "import sys; sys.path.remove(''); from sftmix.cli import main; sys.exit(main())"]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m", "sftmix"]
    elif module:
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


@pytest.mark.parametrize(
    ("inside", "name", "found"),
    [
        ("a/run", "evil_in_a_run", False),
        ("a/run/train", "evil_in_a_stage", False),
        ("a", "run.evil_in_a_run", False),
        (".", "a.run.evil_in_a_run", False),
        ("a", "beside_a_run", True),
        (".", "a_package.beside_a_run", True),
    ],
)
def test_a_run_directory_brings_no_classes_of_its_own(inside, name, found, tmp_path, monkeypatch):
    """Its config.yaml names one, and the command is given in the directory or around it."""
    for path in ("a/run/evil_in_a_run", "a/run/train/evil_in_a_stage", "a/beside_a_run", "a_package/beside_a_run"):
        file = tmp_path / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("from sftmix.components import Median\n\nclass Mine(Median):\n    pass\n")
    (tmp_path / "a" / "run" / "config.yaml").write_text(f"splitter: {name}.Mine\n")
    monkeypatch.chdir(tmp_path / inside)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = os.path.relpath(tmp_path / "a" / "run" / "config.yaml")
    if found:
        assert type(read_config(path).splitter).__name__ == "Mine"
        return
    with pytest.raises(ConfigError, match=f"No module named '{name.partition('.')[0]}'"):
        read_config(path)
    assert os.getcwd() not in sys.path


@long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_class_of_ones_own_may_import_what_lies_beside_it(ranks, tiny, tmp_path):
    """At once and when it runs."""
    (tmp_path / "my_callback.py").write_text(OWN)
    (tmp_path / "my_words.py").write_text("BEGINNING = 'the begin'")
    (tmp_path / "my_ending.py").write_text("ENDING = 'ning and the end'")
    done = command(
        *short(tiny, out=tmp_path / "run"), "--callbacks+", "my_callback.Mine", cwd=tmp_path, ranks=ranks, module=True
    )
    assert done.returncode == 0, done.stderr
    assert "the beginning and the end" in done.stdout
