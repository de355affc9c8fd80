"""Peak memory: of a stage, not of the process, and the most of all ranks."""

import mmap
import sys

import pytest

from sftmix.ranks.world import World
from sftmix.training.memory import PeakMemory
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
