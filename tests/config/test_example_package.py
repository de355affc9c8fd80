"""The worked example of the documentation: a package outside the repository, chosen by import path."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sftmix.components.listing import catalogue
from tests.tiny import ROOT, Tiny, make_tiny

pytestmark = pytest.mark.long

EXAMPLE = ROOT / "docs" / "examples" / "confidence_lab"


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Path:
    """The package where a user has it: nowhere near the repository."""
    place = tmp_path_factory.mktemp("laboratory")
    return shutil.copytree(EXAMPLE, place / "confidence_lab")


def python(laboratory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(laboratory), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=laboratory, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_its_own_tests_pass(laboratory):
    done = python(laboratory, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"^{len(catalogue())} passed", done.stdout, re.M), done.stdout


@pytest.mark.slow
def test_every_class_is_chosen_from_the_command_line(laboratory):
    """The command of its README as it stands, on the tiny model and rows."""
    tiny: Tiny = make_tiny(laboratory / "tiny")
    block = re.search(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    words = shlex.split(block[1].replace("\\\n", " "))[1:]
    known = {"gpt2": str(tiny.model), "rows.json": str(tiny.train), "runs/lab": str(laboratory / "run")}
    small = ["--training.global_batch_size", "8", "--training.max_steps", "8", "--training.learning_rate", "0.01"]
    done = python(laboratory, str(ROOT / "cli.py"), *[known.get(word, word) for word in words], *small)
    assert done.returncode == 0, done.stderr
    config = (laboratory / "run" / "config.yaml").read_text(encoding="utf-8")
    for module in (EXAMPLE / "confidence_lab").glob("[!_]*.py"):
        assert f"confidence_lab.{module.stem}." in config
    assert len(list((EXAMPLE / "confidence_lab").glob("[!_]*.py"))) == len(catalogue())
    lines = [json.loads(line) for line in (laboratory / "run" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["mixup_tokens"] > 0 for line in lines] == [False, False, False, True] * 2
    assert [("mixup_over_ntp" in line) for line in lines] == [False, False, False, True] * 2
