"""Callbacks: work beside the training step."""

import math

from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.components.component import Need, require


class Evaluate(Callback):
    """Held-out evaluation after every epoch, or after every `every` steps."""

    gives = frozenset({Need.EVALUATIONS})

    def __init__(self, *, every: int | None = None):
        """every: optimizer steps between evaluations, at least 1; null evaluates at the end of each epoch."""
        require(every is None or every >= 1, "callbacks.Evaluate.every", every, "null (each epoch), or 1 and above")
        self.every = every

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        due = self.every is not None and state.step % self.every == 0
        return CallbackResult(state.evaluate()) if due and state.evaluate else None

    def on_epoch_end(self, state: StageState) -> CallbackResult | None:
        return CallbackResult(state.evaluate()) if self.every is None and state.evaluate else None


class EarlyStopping(Callback):
    """Stop after `patience` evaluations in a row without a better held-out NLL.

    Put it after the callback that evaluates (`Evaluate`). It looks at every evaluation of the stage, including those
    before a resume. The count restarts at an evaluation more than `min_delta` below the best that restarted it.
    """

    needs = frozenset({Need.HELD_OUT, Need.EVALUATIONS})
    gives = frozenset({Need.STOP})

    def __init__(self, *, patience: int = 3, min_delta: float = 0.0):
        """patience: evaluations without improvement after which training stops, at least 1.

        min_delta: nats per token by which an evaluation must be below the last that restarted the count, 0 or more.
        """
        require(patience >= 1, "callbacks.EarlyStopping.patience", patience, "1 and above")
        require(0 <= min_delta < math.inf, "callbacks.EarlyStopping.min_delta", min_delta, "0 and above")
        self.patience, self.min_delta = patience, min_delta

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        if not state.evaluations:
            return None
        best, since = math.inf, 0
        for _, nll in state.evaluations:
            best, since = (nll, 0) if nll < best - self.min_delta else (best, since + 1)
        return CallbackResult(stop=since >= self.patience)

    on_epoch_end = on_step_end  # Evaluate evaluates at one of both, and is asked before
