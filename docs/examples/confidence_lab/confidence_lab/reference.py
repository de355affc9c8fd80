import numpy as np

from sftmix.components import Need, Reference, ReferenceContext
from sftmix.options import ReferenceTraining
from sftmix.types import TrainingDynamics


class LateReference(Reference):
    """The paper's reference, scored only in the last part of its training, token by token."""

    gives = frozenset({Need.CORRECT, Need.TOKEN_NLL})
    token_nll = True

    def __init__(self, *, start: float = 0.5, count: int = 2, training: ReferenceTraining | None = None):
        """
        start: share of the training before the first scoring.
        count: number of scorings.
        training: differences from the run's training options, and the seed, which `compare` sets.
        """
        self.start, self.count, self.training = start, count, training

    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        places = np.linspace(self.start, 1.0, self.count + 1)[1:].tolist()
        return context.train_and_score(places)
