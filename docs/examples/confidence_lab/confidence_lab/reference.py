import numpy as np

from sftmix.components import Need, Reference, ReferenceContext
from sftmix.types import TrainingDynamics


class LateReference(Reference):
    """The paper's reference, scored only in the last part of its training, token by token."""

    gives = frozenset({Need.CORRECT, Need.TOKEN_NLL})

    def __init__(self, *, start: float = 0.5, count: int = 2):
        """
        start: share of the training before the first scoring.
        count: number of scorings.
        """
        self.start, self.count = start, count

    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        places = np.linspace(self.start, 1.0, self.count + 1)[1:].tolist()
        return context.train_and_score(model=None, training=None, checkpoints=places, token_nll=True)
