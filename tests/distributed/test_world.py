"""Ranks that end with an error end at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.forked import free_port
from tests.tiny import ROOT

ENDINGS = """
import os, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from sftmix.common.errors import Stopped
from sftmix.common.world import start_world

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on one core threads often stop between two steps

def stopped():
    with start_world() as world:
        module = DistributedDataParallel(torch.nn.Linear(4, 4))
        world.share(module is None)
        raise Stopped

for port in sys.argv[1:]:
    os.environ["MASTER_PORT"] = port
    try:
        stopped()
    except Stopped:
        pass
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_end_of_a_wrapped_model_does_not_hang() -> None:
    """Without a reference to the process group it does, within a hundred endings."""
    ports = [str(free_port()) for _ in range(100)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENDINGS, *ports]
    ranks = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
