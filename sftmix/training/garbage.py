"""Python's garbage collector during the steps of a stage: at times of ours, the same on all ranks.

By itself it runs in the middle of a step, on each rank at another moment, for which the others wait; and it goes
through the objects of all libraries each time. After the first step these are frozen, that is left out. If a program
has frozen its objects before, as before a fork, these stay frozen after the stage, and no others are.
"""

import gc
from types import TracebackType

EVERY = 50
"""Steps between two collections. A step of ours leaves no garbage, but a component may."""


class Collector:
    """The collector: off after the first step of a process, and on again, with all objects, after the last."""

    def __init__(self) -> None:
        self.steps = 0
        self.was_on = gc.isenabled()
        self.freezes = not gc.get_freeze_count()

    def __enter__(self) -> "Collector":
        return self

    def after_step(self) -> None:
        if self.steps % EVERY == 0:
            gc.collect()
        if self.steps == 0:
            gc.disable()
            if self.freezes:
                gc.freeze()
        self.steps += 1

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.freezes:
            gc.unfreeze()
        if self.was_on:
            gc.enable()
