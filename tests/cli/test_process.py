"""The command line as a process of its own: what it imports, and from where it starts."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftmix.cli import print_logs_as_lines
from sftmix.cli.commands import COMMANDS
from tests.logs import logged
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


def test_no_log_line_of_a_library_controls_the_terminal(monkeypatch):
    """Escape codes of seven and of eight bits, in the message and in what it quotes."""
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    print_logs_as_lines()
    with logged("transformers.of_a_library") as messages:
        logging.getLogger("transformers.of_a_library").warning("\x1b]52;c;aGk=\x07 %s %d\n", "\x9b2J", 3)
    assert messages == [r"\x1b]52;c;aGk=\x07 \x9b2J 3" + "\n"]
