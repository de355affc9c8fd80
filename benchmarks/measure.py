"""Clocks and memory that several benchmarks read."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Clock:
    """Wall and CPU seconds since the last `lap`: of this process's threads, and of its ended child processes."""

    def __init__(self) -> None:
        self._last = time.perf_counter(), _cpu_seconds()

    def lap(self) -> dict[str, float]:
        before, now = self._last, (time.perf_counter(), _cpu_seconds())
        self._last = now
        return {"seconds": now[0] - before[0], "cpu_seconds": now[1] - before[1]}


def _cpu_seconds() -> float:
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Return the result of `work`, and the time it took."""
    clock = Clock()
    result = work()
    return result, clock.lap()


def held(device: str) -> int:
    """Return the bytes of the device's allocator, or those resident in this process."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def rounded(figures: dict[str, Any], digits: int = 4) -> dict[str, Any]:
    """Return the figures with shorter floats, for a result file."""
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in figures.items()}
