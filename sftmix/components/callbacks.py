"""Callbacks: work beside the training step."""

from __future__ import annotations

from sftmix.common.errors import ConfigError
from sftmix.components.base import Callback, CallbackResult, StageState


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
