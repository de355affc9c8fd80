"""The end of a step: gradients are clipped, and the optimizer, which is built here, moves the weights."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sftmix.components.base import Optimizer
from sftmix.options.training import TrainingOptions
from sftmix.ranks.rng import stable_hash
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError
from sftmix.words.given import as_written


def gradient_shards(model: nn.Module) -> list[torch.Tensor]:
    """Return this rank's part of each gradient."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def trace_of(module: nn.Module) -> int:
    """Return a number below 2^20 of the names of the parameters that have a gradient; 0 if ranks share no weights."""
    if not isinstance(module, FSDPModule):
        return 0
    return stable_hash(*[name for name, p in module.named_parameters() if p.grad is not None]) % 2**20


def refuse_unequal(trace: int, ranks: float, total: float, squares: float) -> None:
    """Raise ConfigError on every rank unless all have this trace, by the sums of 1, of traces and of their squares."""
    if (total, squares) != (ranks * trace, ranks * trace**2):  # the spread of equal traces is 0; exact below 2^53
        raise ConfigError(
            "some ranks have gradients of other parameters than others; fsdp and hsdp add them up as if they were the "
            "same. If experts of the model are modules of their own, use --training.parallel ddp, else one process"
        )


def gradient_norm(model: nn.Module, shards: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients of a model, of which this rank has these shards: [], float32 or better.

    Squares are summed in float64: in float32 the norm of 7M gradients is off by 1e-5 on a CPU, and how far depends on
    how the ranks divide the gradients. Under FSDP and HSDP they are those of this rank's shards, and the ranks that
    share one copy of the weights add them up; every parameter is sharded there.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(shards, 2.0, torch.float64)))
    if isinstance(model, FSDPModule):
        mesh: Any = next(model.parameters()).device_mesh  # type: ignore[attr-defined]
        dist.all_reduce(square := norm.square(), group=mesh.get_group(-1))
        norm = square.sqrt()
    return norm.to(torch.promote_types(shards[0].dtype, torch.float32))


def clip_gradients(shards: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Clip the gradients, whose norm over all shards is given, to the norm `max_norm`; 0: leave them as they are."""
    if max_norm > 0:
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return True for torch's fused Adam and AdamW on CUDA, which divide gradients and leave out a step themselves.

    SGD does so too, but goes on from momentum that nothing was written to if its first step was left out (torch 2.13).
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    return all(group["fused"] and group["params"][0].is_cuda for group in optimizer.param_groups)


def clip_and_update(optimizer: Any, norm: torch.Tensor, loss: torch.Tensor, max_norm: float, world: World) -> None:
    """Clip and update in one pass over the gradients, unless the norm or the loss of any rank is not finite.

    The device knows both before the host does, which reads them later. The optimizer divides each gradient as it reads
    it: `clip_gradients` would read and write all of them before.
    """
    skip = (~(norm.isfinite() & loss.isfinite())).float()
    if world.size > 1:
        dist.all_reduce(skip, op=dist.ReduceOp.MAX)
    optimizer.found_inf = skip
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float() if max_norm > 0 else None
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale  # which no checkpoint holds


def learning_rate(step: int, total_steps: int, options: TrainingOptions) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up in ceil(ratio * total), then the schedule."""
    warmup = math.ceil(as_written(options.warmup_ratio) * total_steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.learning_rate * {"cosine": cosine, "linear": 1.0 - progress, "constant": 1.0}[options.schedule]


def build_optimizer(model: nn.Module, options: TrainingOptions, optimizer: Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer over all trainable parameters of `model` and nothing else.

    Raises ConfigError if it takes other parameters than these, or some twice.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    built = optimizer.build(trainable, training=options)
    # A checkpoint would leave out an empty one, as of weights that an adapter freezes, and then not fit.
    built.param_groups[:] = [group for group in built.param_groups if group["params"]]
    left = {id(p): name for name, p in trainable.items()}
    taken = [left.pop(id(p), None) for group in built.param_groups for p in group["params"]]
    if left or None in taken:
        raise ConfigError(
            f"optimizer {optimizer} must take each of {len(trainable)} parameters once; it has {len(taken)}, and left "
            f"out {list(left.values())[:3]}"
        )
    return built
