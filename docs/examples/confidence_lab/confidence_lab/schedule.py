from sftmix.components import Schedule


class Pulse(Schedule):
    """`high` in one step out of `period`, 0 in the others."""

    def __init__(self, *, period: int = 2, high: float = 0.4):
        """
        period: steps from one pulse to the next.
        high: the value of a pulse.
        """
        self.period, self.high = period, high

    def value(self, step: int, total_steps: int) -> float:
        return self.high if step % self.period == self.period - 1 else 0.0
