"""The optimizer of a stage, over all that is trained and nothing else."""

import torch
from torch import nn

from sftmix.common.errors import ConfigError
from sftmix.components.base import Optimizer
from sftmix.components.optimizers import AdamW
from sftmix.options import TrainingOptions


def build_optimizer(
    model: nn.Module, options: TrainingOptions, optimizer: Optimizer | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer (None: AdamW) over the trainable parameters of `model`.

    Raises ConfigError if the optimizer takes other parameters than these, or some twice.
    """
    chosen = AdamW() if optimizer is None else optimizer
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    built = chosen.build(trainable, training=options)
    taken = [id(p) for group in built.param_groups for p in group["params"]]
    if sorted(taken) != sorted(map(id, trainable.values())):
        left = [name for name, p in trainable.items() if id(p) not in taken]
        raise ConfigError(
            f"optimizer {type(chosen).__name__} must take each of {len(trainable)} parameters once; it has "
            f"{len(taken)}, without {', '.join(left[:3]) or 'leaving any out'}"
        )
    return built
