"""Peak memory: of a stage, not of the process, and the most of all ranks."""

from __future__ import annotations

import mmap
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sftmix.common.world import World
from sftmix.pipeline.context import Made, RunContext
from sftmix.training.log import PeakMemory
from tests.forked import on_ranks

MB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset elsewhere")


def hold(megabytes: int) -> mmap.mmap:
    """Resident pages that no allocator had before, and that are gone when nobody holds them."""
    pages = mmap.mmap(-1, megabytes * MB)
    for page in range(0, len(pages), mmap.PAGESIZE):
        pages[page] = 1
    return pages


def of_stages(world: World) -> None:
    before = PeakMemory(world.device)
    start = before.bytes()
    hold(120)
    peak = before.bytes()
    assert 110 * MB < peak - start < 140 * MB
    after = PeakMemory(world.device)
    floor = after.bytes()
    assert floor < start + 20 * MB
    kept = hold(50)
    assert 40 * MB < after.bytes() - floor < 80 * MB
    assert len(kept) == 50 * MB


def test_it_holds_what_was_freed_and_forgets_the_stage_before():
    on_ranks(of_stages, ranks=1)  # a process of its own: what others freed in this one could be taken again


def finished(world: World) -> None:
    """Rank 1 holds more than rank 0 for a while; both write the same, and it is rank 1's."""
    written: list[Any] = []
    directory = SimpleNamespace(finish=lambda stage, outputs, figures: written.append(figures))
    run: Any = SimpleNamespace(
        world=world, directory=directory, memory=PeakMemory(world.device), _began=time.time() - 1
    )
    start = run.memory.bytes()
    hold(20 + 150 * world.rank)
    own = run.memory.bytes()
    RunContext.finish(run, "split", Made([]))
    assert 1.0 <= written[0]["wall_seconds"] < 60
    peak = written[0]["peak_memory_bytes"]
    assert peak - start > 120 * MB
    assert peak == max(world.gather(own))


def test_it_is_the_most_of_all_ranks():
    on_ranks(finished)
