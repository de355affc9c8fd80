"""The worked example of the documentation: a package outside the repository, whose own tests pass there."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from sftmix.components.listing import catalogue
from tests.tiny import ROOT


@pytest.mark.slow
def test_its_own_tests_pass(tmp_path):
    """Where a user has the package: nowhere near the repository."""
    place = shutil.copytree(ROOT / "docs" / "examples" / "confidence_lab", tmp_path / "confidence_lab")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(rf"^{len(catalogue())} passed", done.stdout, re.M), done.stdout
