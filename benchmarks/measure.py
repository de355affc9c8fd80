"""Clocks and memory that several benchmarks read."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
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


class Card:
    """The clock and the power of a GPU while contestants take turns: a figure at the card's limit is the limit's.

    `turn` names who runs now. Without `nvidia-smi` nothing is read.
    """

    COMMAND = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-lms", "20")

    def __init__(self, device: str) -> None:
        self.turn: str | None = None
        self._read = defaultdict[str, list[tuple[float, float]]](list)
        self._command: list[str] = []
        if device == "cuda" and shutil.which("nvidia-smi"):
            self._command = [*self.COMMAND, "-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}"]

    def __enter__(self) -> "Card":
        if self._command:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
            self._thread = threading.Thread(target=self._listen)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._command:
            with self._process:
                self._process.terminate()
                self._thread.join()

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            with contextlib.suppress(ValueError):  # a card that does not say: [N/A]
                mhz, watts = (float(word) for word in line.split(","))
                if self.turn is not None:
                    self._read[self.turn].append((mhz, watts))

    def figures(self, turn: str) -> dict[str, float]:
        """Return the medians of MHz and watts in the turns of one contestant."""
        read = self._read[turn]
        return {"mhz": median(mhz for mhz, _ in read), "watts": median(watts for _, watts in read)} if read else {}


def in_turns(
    contestants: Mapping[str, Callable[[], T]], card: Card, rounds: int = sys.maxsize
) -> Iterator[tuple[int, str, T, dict[str, float]]]:
    """Let contestants take turns, in an order of chance in each round; yield round, name, result and time.

    Whom the caller takes out of `contestants` meanwhile has no more turns; without any there are no more rounds.
    """
    for number in range(rounds):
        if not contestants:
            return
        turns = sorted(contestants)
        random.Random(number).shuffle(turns)
        for name in turns:
            card.turn = name
            yield number, name, *timed(contestants[name])
            card.turn = None


def held(device: str) -> int:
    """Return the bytes of the device's allocator, or those resident in this process."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def rounded(figures: dict[str, Any], digits: int = 4) -> dict[str, Any]:
    """Return the figures with shorter floats, for a result file."""
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in figures.items()}
