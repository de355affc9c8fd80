import numpy as np

from sftmix.components import ConfidenceEstimator, Need
from sftmix.types import Float64, TrainingDynamics
from sftmix.words.errors import ConfigError


class WorstToken(ConfidenceEstimator):
    """Minus the NLL of the response's hardest token, averaged over the checkpoints."""

    needs = frozenset({Need.TOKEN_NLL})  # a reference that never has them is refused before it is trained

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        if dynamics.token_nll is None:
            raise ConfigError(
                "WorstToken: these dynamics lack the NLL of tokens; write it with --reference.token_nll true"
            )
        worst = [nll.max(axis=1).mean() if nll.size else np.nan for nll in dynamics.token_nll]
        return -np.asarray(worst, dtype=np.float64)
