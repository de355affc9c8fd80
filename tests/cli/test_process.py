"""The command line as a process of its own: what it imports, and from where it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftmix.cli.commands import COMMANDS
from tests.tiny import ROOT


def process(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


HEAVY = ("torch", "transformers", "datasets", "peft", "pyarrow")


def test_help_wrong_options_and_print_config_import_nothing_heavy():
    lines = [[name, "--help"] for name in COMMANDS]
    lines += [["--help"], ["run"], ["run", "--epochs", "3"], ["run", "--print_config"], ["components"]]
    script = f"""
import contextlib, io, sys
from sftmix.cli import main
for line in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(line)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (line, loaded)
print("ok")
"""
    done = process("-c", script)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


ALLOCATOR = """
import os, sys
from sftmix.cli import main
assert main(["--version"]) == 0
assert "torch" not in sys.modules
print({name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")})
"""


@pytest.mark.parametrize("own", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_the_allocator_has_expandable_segments_unless_the_user_set_it(monkeypatch, own):
    """Before torch is imported, which reads the variable then."""
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:512")
    expected = {own: "max_split_size_mb:512"} if own else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = process("-c", ALLOCATOR)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, [str(expected)]), done.stderr


def test_python_m_sftmix_is_the_command_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = process("-m", "sftmix", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def test_a_working_directory_that_was_removed_is_said(tmp_path):
    program = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    for number, words in enumerate((["-m", "sftmix"], [str(ROOT / "cli.py")])):
        (here := tmp_path / str(number)).mkdir()
        done = process("-c", program, *words, "status", "run", cwd=here)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: the working directory was removed; change to one that is there\n"


HOSTILE = """
import logging, sys, warnings
from sftmix import cli
cli.outlast_readers()
name = "layer\\x1b]52;c;aGk=\\x07\\x9b2J\\r\\u202e"
handler = logging.StreamHandler()
handler.setFormatter(logging.Formatter("%(message)s"))
logging.getLogger("transformers").addHandler(handler)
logging.getLogger("transformers").warning("%s is new", name)
warnings.showwarning(UserWarning(name), UserWarning, "f", 1)
print(name, "!")
from sftmix.words.progress import progress_bar
sys.stderr.isatty = lambda: True
with progress_bar("Reading", total=2, unit=" rows") as bar:
    bar.update(2)
sys.stderr.write("\\n\\x1b[A")
print("\\x1b[0;32mgreen\\x1b[0m")
raise ValueError(name)
"""


def test_no_line_controls_the_terminal_whoever_prints_it():
    """Of our own, of libraries' logs and warnings, and of tracebacks; bars and our colours work."""
    done = process("-c", HOSTILE)
    shown = r"layer\x1b]52;c;aGk=\x07\x9b2J\r\u202e"
    lines = done.stderr.split("\n")
    assert done.stdout == f"{shown} !\n\x1b[0;32mgreen\x1b[0m\n"
    assert lines[0] == f"{shown} is new"
    assert lines[1] == f"f:1: UserWarning: {shown}"
    assert lines[-2] == f"ValueError: {shown}"
    assert "Reading:   0%|" in done.stderr
    assert "rows/s]\x1b[K\n\n\x1b[A" in done.stderr
    assert r"\x1b[K" not in done.stderr
