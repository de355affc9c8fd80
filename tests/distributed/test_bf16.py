"""Steps in bf16 through the loop, in one process, DDP, FSDP2 and HSDP: what is computed in bf16, and what is not (T19).

A step is compared with the same step by hand, without any wrapping, and with one in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from sftmix.batches.order import Slot, Unit
from sftmix.common.world import World
from sftmix.components import NEFTune, SFTMix
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.training.loop import Stage, TrainingLoop
from sftmix.training.module import TrainingModule
from sftmix.training.step import micro_batches, normalise
from tests.distributed.test_sharding import Collectives
from tests.forked import on_ranks
from tests.toy import FixedOrder, toy_model, toy_rows

pytestmark = pytest.mark.slow

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])
UNITS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4),), (Slot(5),)]
OBJECTIVE = SFTMix(mu=0.5)
WAYS = {  # training.parallel, and whether embeddings are perturbed
    "one process": ("none", False),
    "ddp": ("ddp", False),
    "fsdp": ("fsdp", False),
    "hsdp": ("hsdp", False),
    "ddp, perturbed": ("ddp", True),
    "fsdp, perturbed": ("fsdp", True),
}


def options_of(parallel: str) -> TrainingOptions:
    group = 1 if parallel == "hsdp" else None
    return TrainingOptions(
        parallel=parallel, precision="bf16", micro_batch_size=2, max_grad_norm=0.0, shard_group_size=group
    )


def first_step(world: World, directory: Path, way: str) -> dict[str, torch.Tensor]:
    """Gradients of the first of two steps, whole, and its loss; dtypes are checked on the way."""
    parallel, perturbed = WAYS[way]
    loop = TrainingLoop(
        Stage(
            name="train",
            model=toy_model(dtype=torch.float32, tied=True),
            data=DATA,
            order=FixedOrder([UNITS, UNITS]),  # type: ignore[arg-type]
            objective=OBJECTIVE,
            options=options_of(parallel),
            checkpoint=CheckpointOptions(),
            directory=directory,
            seed=0,
            perturbation=NEFTune() if perturbed else None,
        ),
        world,
    )
    model, inside = loop.stage.model, set()
    for layer in model.transformer.h:
        layer.mlp.register_forward_hook(lambda module, args, out: inside.add(out.dtype))
    taken: list[dict[str, torch.Tensor]] = []

    def take(optimizer: Any, args: Any, kwargs: Any) -> None:
        taken.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    loop.optimizer.register_step_pre_hook(take)
    with Collectives() as collectives:
        metrics, _ = loop.advance()
    whole = {name: whole_of(gradient).clone().contiguous() for name, gradient in taken[0].items()}
    loop.advance()
    assert inside == {torch.bfloat16}
    stored = [*model.parameters(), *taken[0].values(), *taken[1].values()]
    stored += [value for state in loop.optimizer.state.values() for value in state.values()]
    assert len(loop.optimizer.state) == len(whole) == len(list(model.parameters()))
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    check_collectives(collectives, parallel)
    return whole | {"loss": torch.tensor(metrics["loss"], dtype=torch.float64)}


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_collectives(found: Collectives, parallel: str) -> None:
    """Gradients are summed in float32; weights are gathered in what is computed in."""
    if parallel == "fsdp":
        assert found.dtypes["reduce_scatter"] == {torch.float32}
        assert found.dtypes["all_gather"] == {torch.bfloat16}
    if parallel in ("ddp", "hsdp"):  # hsdp in groups of one rank
        assert found.dtypes["all_reduce"] == {torch.float32, torch.float64}  # and the counts of tokens


def of_ranks(world: World, path: str) -> None:
    for way, (parallel, _) in WAYS.items():
        if parallel != "none":
            found = first_step(world, Path(path) / way, way)
            if world.is_main:
                save_file(found, Path(path) / f"{way}.safetensors")


def by_hand(way: str, *, compute: str) -> dict[str, torch.Tensor]:
    """The gradients and the loss of `first_step`, the micro-batches of all ranks one after the other on a plain model.

    compute  float32; autocast to bf16; or a model in bf16, as a rank under FSDP has it while it computes
    """
    parallel, perturbed = WAYS[way]
    size = 1 if parallel == "none" else 2
    module = TrainingModule(toy_model(dtype=torch.bfloat16 if compute == "bf16" else torch.float32, tied=True))
    batches = [
        batch
        for rank in range(size)
        for batch in micro_batches(
            UNITS, DATA, options_of(parallel), World(rank=rank, size=size), module, split=None, pad_id=0
        )
    ]
    plans = [OBJECTIVE.plan(batch, step=0, total_steps=2, seed=0) for batch in batches]
    ntp, mixup = sum(plan.ntp_count for plan in plans), sum(plan.mixup_count for plan in plans)
    perturb = partial(NEFTune().embeddings, step=0, seed=0) if perturbed else None
    total: dict[str, torch.Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
    for batch, plan in zip(batches, plans, strict=True):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == "autocast"):
            scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=1)
            loss = module(batch, scaled, perturb=perturb).loss
        loss.backward()
        parts = {name: p.grad.float() for name, p in module.model.named_parameters()} | {"loss": loss.detach().double()}
        total = {name: part + total.get(name, 0) for name, part in parts.items()}
    return total


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Callable[[str], dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("bf16")
    on_ranks(of_ranks, str(path))
    save_file(first_step(World(), path / "one", "one process"), path / "one process.safetensors")
    return lambda way: load_file(path / f"{way}.safetensors")


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("way", WAYS)
def test_a_step_in_bf16_is_that_of_a_plain_model(steps, way):
    """The roundings to bf16 are the same ones, so what is left is the order of float32 sums over micro-batches and
    ranks: a few roundings of at most 2^-24 = 6e-8 each."""
    found = steps(way)
    expected = by_hand(way, compute="bf16" if WAYS[way][0] in ("fsdp", "hsdp") else "autocast")
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert distance(found[name], right) < 1e-6, name


ROUNDING = 2**-8 * 0.42
"""Relative error of a rounding to 8 bits, root mean square: uniform in +-2^-8 for numbers from 1 to 2, whose inverse
squares average to 0.54 where their logarithms are uniform, and sqrt(0.54 / 3) = 0.42."""
FORWARD = 38
"""Roundings one after the other in this model: 16 in each of 2 layers (norms, 4 matmuls with their weights, scores,
softmax, values, activation, residuals), 3 for the embeddings, 3 for last norm and head. The backward has as many."""


@pytest.mark.parametrize("way", WAYS)
def test_a_step_in_bf16_is_one_in_float32_but_for_rounding(steps, way):
    """Independent errors add up by their squares. The gradient's is expected at sqrt(2 FORWARD) ROUNDING = 1.4%.

    The loss's: hidden states are off by sqrt(FORWARD) ROUNDING = 1%; logits are of size 1.2 (width 16, weights of 0.3),
    so the difference of two is off by sqrt(2) 1.2 1% = 0.017, and the mean of that over 29 tokens, with half of another
    for Mixup, by 0.0035, of a loss of 7.3.
    """
    found, expected = steps(way), by_hand(way, compute="float32")
    assert found.keys() == expected.keys()
    loss = 2**0.5 * 1.2 * (FORWARD / 29) ** 0.5 * ROUNDING * (1 + 0.5**2) ** 0.5 / 7.3
    assert distance(found["loss"], expected["loss"]) < 3 * loss
    both = [torch.cat([step[name].flatten() for name in expected if name != "loss"]) for step in (found, expected)]
    gradient = (2 * FORWARD) ** 0.5 * ROUNDING
    assert ROUNDING < distance(*both) < 2 * gradient  # from below, so that the test is of bf16 at all
