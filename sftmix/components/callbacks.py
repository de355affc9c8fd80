"""Callbacks: work beside the training step."""

from __future__ import annotations

import math

from sftmix.common.errors import ConfigError
from sftmix.components.base import Callback, CallbackResult, StageState, check_number


class Evaluate(Callback):
    """Held-out evaluation after every epoch, or after every `every` steps."""

    observer = True

    def __init__(self, *, every: int | None = None) -> None:
        """every: optimizer steps between evaluations, at least 1; null evaluates at the end of each epoch."""
        if every is not None and every < 1:
            raise ConfigError(f"callbacks.Evaluate.every is {every}; allowed: null (each epoch), or 1 and above")
        self.every = every

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        return self._evaluate(state) if self.every is not None and state.step % self.every == 0 else None

    def on_epoch_end(self, state: StageState) -> CallbackResult | None:
        return self._evaluate(state) if self.every is None else None

    @staticmethod
    def _evaluate(state: StageState) -> CallbackResult | None:
        return None if state.evaluate is None else CallbackResult(metrics=state.evaluate())


class EarlyStopping(Callback):
    """Stop after `patience` evaluations in a row without a better held-out NLL.

    It stands after the callback that evaluates (`Evaluate`), and decides on every evaluation of the stage, those before
    a resume included: the first that is better than all before it, by more than `min_delta`, starts the count anew.
    """

    needs_held_out = True

    def __init__(self, *, patience: int = 3, min_delta: float = 0.0):
        """patience: evaluations without improvement after which training stops, at least 1.

        min_delta: nats per token by which an evaluation must be below the best one before, 0 or more.
        """
        if patience < 1:
            raise ConfigError(f"callbacks.EarlyStopping.patience is {patience}; allowed: 1 and above")
        check_number("callbacks.EarlyStopping.min_delta", min_delta, least=0.0, hint="0 and above")
        self.patience, self.min_delta = patience, min_delta

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        return self._stop_if_due(state)

    def on_epoch_end(self, state: StageState) -> CallbackResult | None:
        return self._stop_if_due(state)

    def _stop_if_due(self, state: StageState) -> CallbackResult | None:
        if not state.evaluations or state.evaluations[-1][0] != state.step:  # no evaluation of these weights
            return None
        best, since = math.inf, 0
        for _, nll in state.evaluations:
            best, since = (nll, 0) if nll < best - self.min_delta else (best, since + 1)
        return CallbackResult(stop=since >= self.patience)
