"""The installed package, in an environment of its own: found from every directory, the one that holds it included.

As a checkout, and as the wheel that is published, which must hold every file that is no module.
"""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

import sftmix
from tests.tiny import ROOT

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"
NO_MODULES = {".yaml", ".html", ".css", ".js", ".md", ".txt", ".typed", ".pyi"}
"""Endings of the files of the package that are no modules."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout named sftmix, as `git clone` makes one."""
    place = tmp_path_factory.mktemp("home") / "sftmix"
    shutil.copytree(ROOT / "sftmix", place / "sftmix", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    return place


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def build(kind: str, checkout: Path, to: Path) -> Path:
    """Build a wheel of the checkout, `editable` or `wheel`, as pip does it, and return the file."""
    words = [sys.executable, "-c", BUILD, kind, str(to)]
    made = subprocess.run(words, cwd=checkout, env=environment(), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = to.glob("*.whl")
    return wheel


def packages_of(home: Path) -> Path:
    (packages,) = home.glob("lib/python*/site-packages")
    return packages


@pytest.fixture(scope="module")
def python(checkout, tmp_path_factory):
    """What a fresh interpreter says where that checkout is installed as `pip install -e` does it (without pip)."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    shutil.unpack_archive(build("editable", checkout, home), packages_of(home), "zip")

    def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [str(home / "bin" / "python"), *words]
        return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)

    return run


@pytest.mark.parametrize("where", ["..", ".", "elsewhere"])
def test_the_package_is_found(python, checkout, tmp_path, where):
    place = tmp_path if where == "elsewhere" else checkout / where
    done = python("-c", "from sftmix.words import errors; print(errors.__file__)", cwd=place)  # needs nothing
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(checkout / "sftmix")
    version = python("-m", "sftmix", "--version", cwd=place)
    assert (version.returncode, version.stdout[:7]) == (0, "sftmix "), version.stderr


def test_the_wheel_holds_what_the_package_needs(checkout, tmp_path):
    """Recipes, task files, the page of the report, types and licence; `sftmix` starts where nothing else is there."""
    home = tmp_path / "home"
    venv.create(home, with_pip=False)
    packages = packages_of(home)
    shutil.unpack_archive(build("wheel", checkout, tmp_path), packages, "zip")
    there = {file.relative_to(packages).as_posix() for file in packages.rglob("*")}
    wanted = {file.relative_to(ROOT).as_posix() for file in (ROOT / "sftmix").rglob("*") if file.suffix in NO_MODULES}
    assert {"sftmix/py.typed", "sftmix/recipes/quickstart.yaml"} <= wanted
    assert wanted - there == set()
    (about,) = packages.glob("sftmix-*.dist-info")
    assert about.name == f"sftmix-{sftmix.__version__}.dist-info"
    assert (about / "licenses" / "LICENSE").exists()
    assert "sftmix = sftmix.cli:main" in (about / "entry_points.txt").read_text()
    call = "import sys; from sftmix.cli import main; sys.exit(main(['--help']))"
    words = [str(home / "bin" / "python"), "-c", call]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (done.returncode, "usage: sftmix COMMAND" in done.stdout) == (0, True), done.stderr


def test_the_version_stands_in_one_place():
    texts = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", ROOT / "cli.py", *(ROOT / "sftmix").rglob("*.py")]
    holding = [file.name for file in texts if f'"{sftmix.__version__}"' in file.read_text(encoding="utf-8")]
    assert holding == ["__init__.py"]


def test_the_citation_names_paper_and_software():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["cff-version"], cited["type"], cited["title"]) == ("1.2.0", "software", "SFTMix")
    paper = cited["references"][0]
    assert paper["identifiers"][0] == {"type": "other", "value": "arXiv:2410.05248"}
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    same = ["title", "version", "license", "keywords"]
    assert [zenodo[name] for name in [*same, "description"]] == [cited[name] for name in [*same, "abstract"]]
    assert {one["identifier"] for one in zenodo["related_identifiers"]} == {"arXiv:2410.05248", paper["url"]}


@pytest.mark.parametrize("package", ["sftmix", "sftmix.components"])
def test_type_checkers_see_every_public_name(package):
    """Names that are imported on first use stand in a file of their own for them, which components read as well."""
    module = importlib.import_module(package)
    stub = ast.parse(Path(str(module.__file__) + "i").read_text(encoding="utf-8"))
    seen = {
        a.asname: s.module for s in stub.body if isinstance(s, ast.ImportFrom) for a in s.names if a.asname == a.name
    }
    assert {*seen} == {*module.__all__} - {"__version__"}
    assert {*seen} <= {*dir(module)}
    for name, place in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(place), name)
    if package == "sftmix":
        assert seen == module._PUBLIC
