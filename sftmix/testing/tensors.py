"""Conformance checks of the components that work on tensors: objectives, optimizers and perturbations."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, Unit
from sftmix.components.base import Need, Objective, Optimizer, Perturbation
from sftmix.components.contracts import check_embeddings, check_loss, check_plan
from sftmix.options import TrainingOptions
from sftmix.testing.checks import SEED, assert_is, copy_of, untouched, valid
from sftmix.testing.strategies import RowsInMemory, rows_in_memory
from sftmix.training.module import TrainingModule
from sftmix.training.step import normalise
from sftmix.types import Batch, BatchNLL, Float64, Plan, Split

_DATA = rows_in_memory([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 1), (6, 8)])
_READS = {"item", "tolist", "numpy", "cpu", "nonzero", "bincount", "__bool__", "__int__", "__float__", "__index__"}
_LIBRARY = [os.path.join(*parts) for parts in (("", "transformers", ""), ("sftmix", "functional", ""))]
_UNITS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(5)), (Slot(6), Slot(2, 0.0)), (Slot(7),)]
_SPLIT = Split(group=np.array([0, 1, 0, 1, 0, 1, 0, -1, -1], dtype=np.int8), names=("confident", "unconfident"))


def _batches(cut: Sequence[Sequence[Unit]], data: RowsInMemory) -> list[Batch]:
    rows = torch.tensor(sorted({slot.row for units in cut for unit in units for slot in unit}))
    counts = torch.tensor([int(data[int(row)].target.sum()) for row in rows])
    ids = [data[int(row)].id for row in rows]
    nll = BatchNLL(rows=rows, nll_sum=counts.double() * (1.0 + rows.double() / 3), n_tokens=counts, ids=ids)
    return [replace(collate(units, data, split=_SPLIT), batch_nll=nll) for units in cut]


def _plans(objective: Objective, batches: Sequence[Batch], step: int, total: int) -> list[Plan]:
    plans = [objective.plan(batch, step=step, total_steps=total, seed=SEED) for batch in batches]
    for batch, plan in zip(batches, plans, strict=True):
        valid(check_plan, objective, plan, batch)
        assert plan.mu or not len(plan.pairs), "pairs are mixed, but mu is 0"
        repeats = plan.row_weight[batch.ntp_weight[batch.slot] == 0]
        assert not repeats.any(), f"a repeated slot carries no NTP loss, but its tokens weigh {repeats.tolist()}"
    return plans


class _HostReads(TorchFunctionMode):
    """The places outside torch, transformers and the fused loss that read a tensor's values while it is entered."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.Tensor.__getitem__ and any(getattr(x, "dtype", None) == torch.bool for x in args[1:])
        if by_mask or getattr(func, "__name__", "") in _READS:
            frame = sys._getframe(1)
            while f"{os.sep}torch{os.sep}" in frame.f_code.co_filename and frame.f_back is not None:
                frame = frame.f_back
            file = frame.f_code.co_filename
            if not any(part in file for part in _LIBRARY):
                self.places.append(f"{os.path.basename(file)}:{frame.f_lineno}")
        return func(*args, **(kwargs or {}))


def _loss(
    objective: Objective, batches: Sequence[Batch], plans: Sequence[Plan], move: Float64 | float = 0.0
) -> Float64:
    """Return the loss of the global batch on a small GPT-2 in float64, and its gradient; `move` is added to weights."""
    config = GPT2Config(vocab_size=64, n_embd=8, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = TrainingModule(GPT2LMHeadModel(config).double().eval())
    weights = list(module.parameters())
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(weights) + torch.as_tensor(move), weights)
    ntp, mixup = sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans)
    total = torch.zeros((), dtype=torch.float64)
    for batch, plan in zip(batches, plans, strict=True):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=1)
        with _HostReads() as reads:
            out = module(batch, scaled, loss=objective.loss)
        assert not reads.places, f"loss() reads values on the host, which waits for the device: {reads.places}"
        valid(check_loss, objective, out, scaled)
        total = total + out.loss
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(total, weights, materialize_grads=True))
    return torch.cat([total.detach()[None], gradient]).numpy()


def check_objective(objective: Objective, *, steps: int = 3, finite_differences: bool = True) -> None:
    """Check plans and loss: well formed, drawn from (seed, step, ids) alone, and equal however the batch is cut.

    The loss reads no values on the host (`item`, `tolist`, a mask as an index), which would wait for the device.

    The last point makes a run independent of ranks and micro-batches: the loss and its gradient on a small model,
    divided by the counts of the whole global batch, must not depend on the cut. The gradient is held against finite
    differences.

    finite_differences  False for a loss with detached parts, which have none
    """
    assert_is(objective, Objective)
    whole = _batches([_UNITS], _DATA)
    cuts = [_batches(cut, _DATA) for cut in ([[unit] for unit in _UNITS], [_UNITS[3:], _UNITS[:3]])]
    for step in range(steps):
        with untouched():
            plans = _plans(objective, whole, step, steps)
        value = _loss(objective, whole, plans)
        again = _loss(objective, whole, _plans(copy_of(objective), whole, step, steps))
        np.testing.assert_array_equal(
            again, value, "a copy gives another loss: keep no state, and draw from sftmix.common.rng"
        )
        for batches in cuts:
            other = _loss(objective, batches, _plans(objective, batches, step, steps))
            message = "the loss depends on how the batch is cut into micro-batches"
            np.testing.assert_allclose(other, value, rtol=1e-6, atol=1e-8, err_msg=message)
    if finite_differences:
        norm = float(np.linalg.norm(value[1:]))
        ahead, behind = (_loss(objective, whole, plans, way * value[1:] / max(norm, 1e-30))[0] for way in (1e-5, -1e-5))
        assert math.isclose((ahead - behind) / 2e-5, norm, rel_tol=1e-5, abs_tol=1e-8), "the gradient is not the loss's"
    if Need.PAIRS in objective.needs:
        assert any(len(p.pairs) for p in plans) or plans[0].mu == 0, "it says that it mixes, but no plan has a pair"


def check_perturbation(perturbation: Perturbation, *, tolerance: float = 0.0) -> None:
    """Check that embeddings keep their shape, are differentiable and drawn for each example, whatever its batch."""
    assert_is(perturbation, Perturbation)
    ids, lengths, width = ["a", "b", "c"], [7, 4, 5], 8
    e = torch.linspace(-1, 1, 3 * 7 * width).view(3, 7, width).requires_grad_()
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])

    def run(rows: list[int], length: int, step: int = 2, seed: int = SEED) -> torch.Tensor:
        names = [ids[row] for row in rows]
        return perturbation.embeddings(e[rows, :length], mask[rows, :length], ids=names, step=step, seed=seed)

    with untouched():
        changed = valid(check_embeddings, perturbation, e, run([0, 1, 2], 7))
    (gradient,) = torch.autograd.grad(changed.sum(), e)
    assert gradient.abs().sum() > 0, "no gradient reaches the embeddings"
    torch.testing.assert_close(
        copy_of(perturbation).embeddings(e, mask, ids=ids, step=2, seed=SEED), changed, rtol=0, atol=0
    )
    for row, length in enumerate(lengths):
        alone = run([row], length)[0]
        torch.testing.assert_close(alone, changed[row, :length], rtol=tolerance, atol=tolerance)


def check_optimizer(optimizer: Optimizer) -> None:
    """Check that the optimizer trains exactly its parameters, at its groups' rates, with a state that can be saved."""
    assert_is(optimizer, Optimizer)
    training = TrainingOptions(learning_rate=0.01)

    def trained(
        component: Optimizer, *, steps: int, rate: float = training.learning_rate
    ) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        shapes = {"wte.weight": (6, 4), "layer.weight": (4, 4), "layer.bias": (4,)}
        parameters = {n: nn.Parameter(torch.linspace(-1, 1, math.prod(s)).view(s)) for n, s in shapes.items()}
        built = component.build(parameters, training=training)
        taken = [id(p) for group in built.param_groups for p in group["params"]]
        assert sorted(taken) == sorted(map(id, parameters.values())), "each parameter must be in one group, once"
        for step in range(steps):
            for group in built.param_groups:
                group["lr"] = rate
            for parameter in parameters.values():
                parameter.grad = torch.cos(parameter.detach() * (step + 1))
            built.step()
        return [p.detach() for p in parameters.values()], built

    with untouched():
        moved, built = trained(optimizer, steps=2)
    start, again = trained(optimizer, steps=0)[0], trained(copy_of(optimizer), steps=2)[0]
    for before, after, other in zip(start, moved, again, strict=True):
        assert not torch.equal(before, after), "a step changed nothing"
        assert torch.equal(after, other), "a copy moves the parameters elsewhere: draw nothing at random"
    still = trained(optimizer, steps=2, rate=0.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(start, still, strict=True)), "it moves although the rate is 0"
    for state in built.state.values():
        for name, value in state.items():
            assert isinstance(value, (torch.Tensor, int, float)), (
                f"state {name} is a {type(value).__name__}; a checkpoint holds tensors and numbers"
            )
