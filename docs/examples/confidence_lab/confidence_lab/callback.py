from sftmix.components import Callback, CallbackResult, StageState


class WatchMixup(Callback):
    """Adds to the log how much harder the mixed tokens are than the plain ones."""

    gives = frozenset()  # it never stops the training

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        if not state.metrics.get("mixup"):
            return None
        return CallbackResult(metrics={"mixup_over_ntp": state.metrics["mixup"] / state.metrics["ntp"]})
