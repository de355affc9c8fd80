"""How fast steps are, beside the fastest so far: on a CPU that others use, threads that wait for each other crawl."""

import os

import torch

WINDOW = 10.0
"""Seconds of steps of which a rate is made."""
FELL = 5
"""How many times slower than the best rate is slow."""
LASTS = 60.0
"""Seconds for which steps are slow before a line says so."""


class Pace:
    """The rates of the steps of one process; on a CPU it says once that they fell."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = self.seconds = 0.0
        self.best = self.slow = 0.0
        self.said = device.type != "cpu"

    def after(self, tokens: int, seconds: float) -> str | None:
        """Note the tokens and seconds of a step; return the line that is due, or None."""
        self.tokens += tokens
        self.seconds += seconds
        if self.seconds < WINDOW:
            return None
        rate = self.tokens / self.seconds
        self.best = max(self.best, rate)
        self.slow = self.slow + self.seconds if rate * FELL <= self.best else 0.0
        self.tokens = self.seconds = 0.0
        if self.said or self.slow < LASTS:
            return None
        self.said = True
        return (
            f"{rate:,.0f} tokens a second for a minute, and {self.best:,.0f} before: other programs compute on these "
            f"{os.cpu_count()} cores. Threads that wait for each other do little then: with OMP_NUM_THREADS=1 or "
            "OMP_WAIT_POLICY=PASSIVE in the environment the same command goes on faster"
        )
