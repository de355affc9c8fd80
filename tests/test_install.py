"""The installed package, in an environment of its own: found from every directory, the one that holds it included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.tiny import ROOT

BUILD = "import sys; from setuptools.build_meta import build_editable; print(build_editable(sys.argv[1]))"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout named sftmix, as `git clone` makes one."""
    place = tmp_path_factory.mktemp("home") / "sftmix"
    shutil.copytree(ROOT / "sftmix", place / "sftmix", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    return place


@pytest.fixture(scope="module")
def python(checkout, tmp_path_factory):
    """What a fresh interpreter says where that checkout is installed as `pip install -e` does it (without pip)."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    made = subprocess.run(
        [sys.executable, "-c", BUILD, str(home)], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = home.glob("*.whl")
    (packages,) = home.glob("lib/python*/site-packages")
    shutil.unpack_archive(wheel, packages, "zip")

    def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [str(home / "bin" / "python"), *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("where", ["..", ".", "elsewhere"])
def test_the_package_is_found(python, checkout, tmp_path, where):
    place = tmp_path if where == "elsewhere" else checkout / where
    done = python("-c", "from sftmix import options; print(options.__file__)", cwd=place)  # needs no torch
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(checkout / "sftmix")
    version = python("-m", "sftmix", "--version", cwd=place)
    assert (version.returncode, version.stdout[:7]) == (0, "sftmix "), version.stderr
