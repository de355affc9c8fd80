"""F22: 2,000 steps with 200 checkpoints in one process: memory and open files stay as they are."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch

from sftmix.batches.order import Slot
from sftmix.components.base import Callback
from sftmix.options import CheckpointOptions
from sftmix.ranks.world import World
from sftmix.training.loop import train
from tests.faults.runs import long
from tests.toy import toy_rows, toy_stage

STEPS, EVERY = 2000, 10
DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])


class Watch(Callback):
    """Resident memory and open files, every 20 steps."""

    gives = frozenset()

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def on_step_end(self, state) -> None:
        if state.step % 20 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append((state.step, pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd"))))


def soak(directory: str) -> None:
    """Train so many steps, and write down what was seen."""
    torch.set_num_threads(1)
    watch, batches = Watch(), [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * (STEPS // 2)
    kept = CheckpointOptions(every=EVERY, keep=2)
    train(toy_stage(Path(directory), batches, data=DATA, checkpoint=kept, callbacks=[watch]), World())
    (Path(directory) / "seen.json").write_text(json.dumps(watch.seen))


@long
def test_memory_and_open_files_stay(tmp_path):
    """In a process of its own: pytest keeps every record that torch logs of a save, which is 50 KB a step here."""
    process = multiprocessing.get_context("forkserver").Process(target=soak, args=(str(tmp_path),))
    process.start()
    process.join(600)
    process.kill()
    assert process.exitcode == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    step, memory, files = np.array([s for s in seen if s[0] > 500]).T
    assert len(step) == 75
    assert np.polyfit(step, memory, 1)[0] < 5 * 1024
    assert files.max() - files.min() <= 2
