"""AdamW with 8-bit state."""

from collections.abc import Mapping

from sftmix.components.base import Optimizer
from sftmix.components.component import Need
from sftmix.components.optimizers import decay_groups
from sftmix.options.training import TrainingOptions
from sftmix.types import Tensor, TorchOptimizer


class AdamW8bit(Optimizer):
    """AdamW with blockwise 8-bit state by bitsandbytes (arXiv 2110.02861): two bytes per trained parameter.

    Parameters of fewer than 4,096 numbers keep float32 state. Ranks cannot share the weights, because
    blocks of the state do not follow the shards.
    """

    package = "bitsandbytes"
    needs = frozenset({Need.WHOLE_WEIGHTS})
    state_bytes = 2

    def build(self, parameters: Mapping[str, Tensor], *, training: TrainingOptions) -> TorchOptimizer:
        from bitsandbytes.optim import AdamW8bit as Blockwise  # type: ignore[import-not-found, import-untyped, unused-ignore]

        groups = decay_groups(parameters, training.weight_decay)
        return Blockwise(groups, lr=training.learning_rate, betas=tuple(training.betas), eps=training.eps)
