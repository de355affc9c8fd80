"""Every module is imported, and a whole run is made, without what Windows lacks. On Windows itself nothing was run."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from sftmix.words.errors import ConfigError
from tests.text.small_tokenizers import chatml_tokenizer, make_encoder
from tests.tiny import make_tiny, weights

AS_ON_WINDOWS = """
import contextlib, importlib, os, pkgutil, signal, sys
import accelerate, datasets, filelock, peft, scipy.optimize, torch.distributed.checkpoint, torch.testing, transformers

with contextlib.suppress(ImportError):  # extras
    import lm_eval.tasks, plotly.io, sklearn.decomposition

# The libraries above have ways of their own on Windows, and keep those of this system.
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[name] = None

class Windows:
    def __init__(self, real, absent, **other):
        self.real, self.absent, self.other = real, absent.split(), other
    def __getattr__(self, name):
        if name in self.absent:
            raise AttributeError(f"{self.real.__name__}.{name} is not there on Windows")
        return self.other.get(name) or getattr(self.real, name)

def opens(path, *more, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return os.open(path, *more, **named)

def kills(pid, number):
    raise AssertionError(f"os.kill({pid}, {number}) sends Ctrl-C, or ends the process")

absent = "fork register_at_fork sched_getaffinity getuid geteuid getgid getpgid killpg setsid setpgid uname nice "
absent += "statvfs getloadavg fchmod chown mkfifo posix_fallocate O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_CLOEXEC WNOHANG"
windows = {
    os: Windows(os, absent, open=opens, kill=kills),
    signal: Windows(signal, "SIGUSR1 SIGUSR2 SIGHUP SIGQUIT SIGKILL SIGALRM SIGCHLD SIGPIPE pthread_kill alarm pause"),
    sys: Windows(sys, "", platform="win32"),
}

import sftmix
for found in pkgutil.walk_packages(sftmix.__path__, "sftmix."):
    if not found.name.endswith("__main__"):
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            assert str(error.name).startswith(("lm_eval", "triton", "axolotl")), error
            continue
        for real, other in windows.items():
            if vars(module).get(real.__name__) is real:
                setattr(module, real.__name__, other)
from sftmix.cli import main
print("codes", [main(words.split()) for words in sys.argv[1:]])
"""
"""A program that runs several commands, its arguments."""


@pytest.mark.long
@pytest.mark.slow
def test_a_run_needs_nothing_that_windows_lacks(tmp_path):
    tiny = make_tiny(tmp_path / "tiny")
    run = " ".join(["run", *tiny.options, "--checkpoint.every", "3", "--out", "run"])
    (tmp_path / "other").mkdir()
    other = {"stage": "train", "exit_code": None, "pid": os.getpid(), "host": socket.gethostname()}
    other["created"] = psutil.Process().create_time()
    (tmp_path / "other" / "STATUS.json").write_text(json.dumps(other))
    program = [sys.executable, "-c", AS_ON_WINDOWS]
    done = subprocess.run([*program, run, "status run other", run], cwd=tmp_path, capture_output=True, text=True)
    assert "codes [0, 0, 0]" in done.stdout, done.stderr
    assert "finished" in done.stdout
    assert f"running train, pid {os.getpid()}" in done.stdout
    here = subprocess.run([sys.executable, "-m", "sftmix", *run.split()[:-1], "here"], cwd=tmp_path)
    assert here.returncode == 0
    for name, weight in weights(tmp_path / "here").items():
        assert weights(tmp_path / "run")[name].equal(weight)


@pytest.mark.parametrize("lacks", ["resource", "signal.setitimer"])
def test_a_rendering_is_bounded_in_characters_where_the_system_bounds_nothing(lacks, tmp_path, monkeypatch):
    module, _, name = lacks.partition(".")
    if name:
        monkeypatch.delattr(sys.modules[module], name)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    template = tmp_path / "long.jinja"
    template.write_text("{{ messages[0]['content'] * 999999 }}")
    with pytest.raises(ConfigError, match=r"1,0.* characters; choose another"):
        make_encoder(chatml_tokenizer(), str(template))
