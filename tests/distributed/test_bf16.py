"""Steps in bf16 through the loop, in one process, DDP and FSDP2: what is computed in bf16, and what is not (T19)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from sftmix.batches.order import Slot, Unit
from sftmix.common.world import World
from sftmix.components import SFTMix
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.training.loop import Stage, TrainingLoop
from tests.distributed.test_sharding import Collectives
from tests.toy import FixedOrder, on_ranks, toy_model, toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])
UNITS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4),), (Slot(5),)]


def first_step(world: World, directory: Path, *, parallel: str, precision: str) -> dict[str, torch.Tensor]:
    """Gradients of the first of two steps, whole, and its loss; dtypes are checked on the way."""
    options = TrainingOptions(parallel=parallel, precision=precision, micro_batch_size=2, max_grad_norm=0.0)
    loop = TrainingLoop(
        Stage(
            name="train",
            model=toy_model(dtype=torch.float32, tied=True),
            data=DATA,
            order=FixedOrder([UNITS, UNITS]),  # type: ignore[arg-type]
            objective=SFTMix(mu=0.5),
            options=options,
            checkpoint=CheckpointOptions(),
            directory=directory,
            seed=0,
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
    assert inside == {torch.bfloat16 if precision == "bf16" else torch.float32}
    stored = [*model.parameters(), *taken[0].values(), *taken[1].values()]
    stored += [value for state in loop.optimizer.state.values() for value in state.values()]
    assert len(loop.optimizer.state) == len(whole) == len(list(model.parameters()))
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    check_collectives(collectives, parallel, precision)
    return whole | {"loss": torch.tensor(metrics["loss"])}


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_collectives(found: Collectives, parallel: str, precision: str) -> None:
    """Gradients are summed in float32; weights are gathered in what is computed in."""
    if parallel == "fsdp":
        assert found.dtypes["reduce_scatter"] == {torch.float32}
        assert found.dtypes["all_gather"] == {torch.bfloat16 if precision == "bf16" else torch.float32}
    if parallel == "ddp":
        assert found.dtypes["all_reduce"] == {torch.float32, torch.float64}  # and the counts of tokens


def of_ranks(world: World, path: str) -> None:
    for parallel in ("ddp", "fsdp"):
        found = first_step(world, Path(path) / parallel, parallel=parallel, precision="bf16")
        if world.is_main:
            save_file(found, Path(path) / f"{parallel}.safetensors")


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Callable[[str], dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("bf16")
    on_ranks(of_ranks, str(path))
    for precision in ("fp32", "bf16"):
        found = first_step(World(), path / precision, parallel="none", precision=precision)
        save_file(found, path / f"{precision}.safetensors")
    return lambda name: load_file(path / f"{name}.safetensors")


@pytest.mark.parametrize("way", ["bf16", "ddp", "fsdp"])
def test_a_step_in_bf16_is_one_in_float32_but_for_rounding(steps, way):
    """bf16 has 8 bits: 0.4% of a value. The lower limit is there so that the test is of bf16 at all."""
    found, expected = steps(way), steps("fp32")
    assert found.keys() == expected.keys()
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=5e-3)
    for name, right in expected.items():
        assert 5e-4 < float((found[name] - right).norm() / right.norm()) < 0.05 or name == "loss", name
