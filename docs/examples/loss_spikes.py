"""A callback that ends a run where its loss leaps.

Copy it to where `sftmix` is started, and add `--callbacks+ loss_spikes.LossSpikeGuard`.
"""

import math
from collections import deque
from statistics import median

from sftmix.components import Callback, StageState
from sftmix.components.component import require
from sftmix.disk.files import read_steps
from sftmix.words.errors import LossLeapError


class LossSpikeGuard(Callback):
    """End the run with exit code 6 at a step whose training loss is above `factor` times the median before it.

    The median is taken over the last `window` finite losses of the stage, including those before a resume; earlier
    steps are not judged. It ends the run before the step is saved, so the last checkpoint is untouched. A run that it
    does not end is the same with and without it: the same command without it goes on past the step.
    """

    gives = frozenset()

    def __init__(self, *, factor: float = 3.0, window: int = 50):
        """factor: times the median above which a loss is a spike, above 1.

        window: number of losses that the median is taken over, at least 2.
        """
        require(1 < factor < math.inf, "callbacks.LossSpikeGuard.factor", factor, "above 1")
        require(window >= 2, "callbacks.LossSpikeGuard.window", window, "2 and above")
        self.factor, self.window = factor, window
        self._losses = deque[float](maxlen=window)

    def on_stage_start(self, state: StageState) -> None:
        """Read the losses before a resume from metrics.jsonl, which holds every bit of them."""
        self._losses.clear()
        for line in [] if state.directory is None else read_steps(state.directory):
            # A node may still see the file as it was before the resume, and all ranks must decide alike.
            if line["step"] <= state.step and line["loss"] is not None:  # null: it was not finite
                self._losses.append(line["loss"])

    def on_step_end(self, state: StageState) -> None:
        loss = state.metrics["loss"]
        if not math.isfinite(loss):  # the loop has skipped this step, and counts it
            return
        if len(self._losses) == self.window and loss > self.factor * (middle := median(self._losses)):
            raise LossLeapError(
                f"{state.stage}: step {state.step} has a loss of {loss:.4g}, more than {self.factor:g} times the "
                f"median {middle:.4g} of the {self.window} steps before it (LossSpikeGuard). The last checkpoint is "
                "untouched: lower training.learning_rate in a run of its own, or go on past the step with the same "
                "command and a greater callbacks.factor, or without LossSpikeGuard"
            )
        self._losses.append(loss)
