"""The optimizer of a stage, the learning rate as a pure function of the step, and clipping."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sftmix.common.errors import ConfigError
from sftmix.components.base import Optimizer
from sftmix.components.optimizers import AdamW
from sftmix.options import TrainingOptions


def build_optimizer(
    model: nn.Module, options: TrainingOptions, optimizer: Optimizer | None = None
) -> torch.optim.Optimizer:
    """The optimizer (None: AdamW) over the trainable parameters of `model`.

    ConfigError where it takes other parameters than those, or some twice.
    """
    chosen = AdamW() if optimizer is None else optimizer
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(isinstance(part, FSDPModule) for part in model.modules()):
        whole = [name for name, p in trainable.items() if not isinstance(p, DTensor)]
        assert not whole, f"{', '.join(whole[:3])}: still gathered; FSDP puts shards in their place, untrained"
    built = chosen.build(trainable, training=options)
    taken = [id(p) for group in built.param_groups for p in group["params"]]
    if sorted(taken) != sorted(map(id, trainable.values())):
        left = [name for name, p in trainable.items() if id(p) not in taken]
        raise ConfigError(
            f"optimizer {type(chosen).__name__} must take each of {len(trainable)} parameters once; it has "
            f"{len(taken)}, without {', '.join(left[:3]) or 'leaving any out'}"
        )
    return built


def learning_rate(step: int, total_steps: int, options: TrainingOptions) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up over ceil(ratio * total), then the schedule."""
    warmup = math.ceil(options.warmup_ratio * total_steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
    }[options.schedule]
    return options.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip to the global norm `max_norm` (0: only measure) and return the norm before clipping, over all shards."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return float(norm)
