"""Schedules: numbers that change during training, for mu and alpha of an objective.

The paper keeps both constant and names a schedule as future work; we claim nothing for any of these.
"""

import math

from sftmix.components.base import Schedule
from sftmix.components.component import require
from sftmix.words.given import as_written


class Constant(Schedule):
    """One value at every step."""

    def __init__(self, *, value: float):
        """value: the value."""
        self._value = value

    def value(self, step: int, total_steps: int) -> float:
        return self._value


class Linear(Schedule):
    """A line from `start` at the first step to `end` at the last."""

    def __init__(self, *, start: float, end: float):
        """
        start: value at the first step.
        end: value at the last step.
        """
        self.start, self.end = start, end

    def value(self, step: int, total_steps: int) -> float:
        done = step / max(total_steps - 1, 1)  # 0 at the first step, 1 at the last; a single step is the first
        return (1 - done) * self.start + done * self.end


class Cosine(Linear):
    """Half a cosine from `start` at the first step to `end` at the last: slow, fast, slow."""

    def value(self, step: int, total_steps: int) -> float:
        left = (1 + math.cos(math.pi * step / max(total_steps - 1, 1))) / 2  # 1 at the first step, 0 at the last
        return left * self.start + (1 - left) * self.end


class AfterFraction(Schedule):
    """`before` until a share of the steps is done, `value` from there on."""

    def __init__(self, *, fraction: float, value: float, before: float = 0.0):
        """
        fraction: share of the steps to wait, from 0 to 1.
        value: value after that.
        before: value until then.
        """
        require(0 <= fraction <= 1, "fraction of a schedule", fraction, "from 0 to 1")
        self.fraction, self._value, self.before = fraction, value, before

    def value(self, step: int, total_steps: int) -> float:
        return self._value if step >= as_written(self.fraction) * total_steps else self.before
