"""The SkyPilot task of the docs: it fits SkyPilot's schema, and what its nodes run works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.forked import free_port
from tests.tiny import ROOT, SHORT, in_this_process, make_tiny, status

pytestmark = [pytest.mark.slow, pytest.mark.long]

FILE = ROOT / "docs" / "examples" / "skypilot.yaml"
PYTHON = os.environ.get("SKYPILOT_PYTHON", sys.executable)
"""The interpreter that has SkyPilot: its pins are not ours, so it is kept in an environment of its own."""
READ = "import sky, sys; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, task.resources)"


def test_the_task_fits_the_schema(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path)}
    env.pop("PYTHONPATH", None)
    if subprocess.run([PYTHON, "-c", "import sky"], env=env, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("SkyPilot is not there: pip install skypilot in an environment of its own, $SKYPILOT_PYTHON")
    found = subprocess.run([PYTHON, "-c", READ, str(FILE)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("2 ")
    assert "{'H100': 8}" in found.stdout


def test_what_each_node_runs(tmp_path):
    tiny = make_tiny(tmp_path)
    printed = in_this_process("run", *tiny.options, *SHORT, "--print_config", cwd=tmp_path)
    (tmp_path / "config.yaml").write_text(printed.stdout)
    task = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    own = {"CONFIG": "config.yaml", "OUT": "run", "PORT": free_port(), "SFTMIX_CACHE": tmp_path / "cache"}
    assert own.keys() <= task["envs"].keys()
    sky = {"NUM_NODES": 1, "NODE_RANK": 0, "NODE_IPS": "127.0.0.1\n", "NUM_GPUS_PER_NODE": 1}
    own |= {f"SKYPILOT_{name}": value for name, value in sky.items()}
    own |= {"PYTHONPATH": ROOT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env = {**os.environ, **{name: str(value) for name, value in {**task["envs"], **own}.items()}}
    done = subprocess.run(
        ["bash", "-euc", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run")["exit_code"] == 0
