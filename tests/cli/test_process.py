"""The command line as a process of its own: what it imports, user classes in the working directory, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sftmix.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["run", "--help"], 0), (["run"], 2), (["nothing"], 2)])
def test_cli_py_returns_the_exit_code(argv, code):
    done = process("cli.py", *argv)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


USER_MODULE = '''
import numpy as np
from sftmix.components import Splitter
from sftmix.types import Split

class ByLength(Splitter):
    """Short and long responses."""
    needs = frozenset()
    def __init__(self, *, longest: int = 100, strict: bool = False) -> None:
        """longest: tokens of a short response."""
        self.longest = longest
    def split(self, scores, *, seed):
        return Split(group=(scores.n_tokens > self.longest).astype(np.int8), names=("short", "long"))
'''


def test_a_users_class_is_found_in_the_working_directory(tmp_path):
    package = tmp_path / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "splits.py").write_text(USER_MODULE)
    argv = ["--splitter", "my_pkg.splits.ByLength", "--splitter.longest", "7", "--splitter.strict", "true"]
    done = process(str(ROOT / "cli.py"), "run", *argv, "--print_config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    spec = yaml.safe_load(done.stdout)["splitter"]
    assert spec == {"class_path": "my_pkg.splits.ByLength", "init_args": {"longest": 7, "strict": True}}
    wrong = process(str(ROOT / "cli.py"), "run", "--splitter", "my_pkg.splits.ByLenth", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "no attribute 'ByLenth'" in wrong.stderr


def test_python_m_sftmix_is_the_command_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = process("-m", "sftmix", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
