"""The ways in which ranks reduce gradients give the first losses, norms and gradients of one process.

NCCL averages where gloo sums and divides; FSDP may reduce once a step or in each micro-batch; HSDP sums over the ranks
of a group and averages over the groups; DDP sums whole buckets.
"""

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from sftmix.batches.order import Slot, Unit
from sftmix.components import SFTMix
from sftmix.ranks.world import World
from sftmix.training.loop import TrainingLoop
from sftmix.training.parallel import unwrap
from tests.distributed.test_sharding import Collectives
from tests.forked import on_ranks
from tests.toy import toy_model, toy_rows, toy_stage

pytestmark = pytest.mark.slow

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])
PAIRS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(5)), (Slot(6), Slot(1))]
UNITS: list[Unit] = [*PAIRS, (Slot(2),), (Slot(4),), (Slot(5),)]
"""For two micro-batches of two examples on each of four ranks: some have no pair, and one has a filler alone."""
EACH = {"reduce_each_micro_batch": True}
SHARDED = {"fsdp": {"parallel": "fsdp"}, "hsdp": {"parallel": "hsdp", "shard_group_size": 2}}
SUMS = ("as it comes", "summed, then divided", "averaged by NCCL")
WAYS: dict[str, tuple[dict[str, Any], str]] = {"ddp": ({"parallel": "ddp"}, SUMS[0])}
WAYS |= {f"{name}, {sums}": (options, sums) for name, options in SHARDED.items() for sums in SUMS}
WAYS |= {f"{name}, each": ({**options, **EACH}, SUMS[0]) for name, options in SHARDED.items()}
WAYS |= {f"{name}, kept": ({**options, "reshard_after_forward": False}, SUMS[0]) for name, options in SHARDED.items()}
CASES = [(way, False) for way in WAYS] + [(way, True) for way in ("ddp", *(f"{name}, as it comes" for name in SHARDED))]
"""Each with a head that is tied or not."""
MAX_NORM = 0.25


class Premultiplied:
    """What NCCL does for AVG: each rank's part is divided by their number before it is added."""

    def allocate(self, size, *, dtype, device):
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        assert op == dist.ReduceOp.AVG
        input_tensor.div_(group.size())
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, dist.ReduceOp.SUM, group, async_op)


def reducing(module: Any, sums: str) -> None:
    for part in module.modules():
        if isinstance(part, FSDPModule) and sums == SUMS[1]:
            part.set_force_sum_reduction_for_comms(True)
        if isinstance(part, FSDPModule) and sums == SUMS[2]:
            part.set_custom_reduce_scatter(Premultiplied())


def first_step(world: World, directory: Path, way: str, *, tied: bool, max_norm: float = MAX_NORM) -> Any:
    """Losses and norm of the first step, its whole gradients as the optimizer gets them, and its collectives."""
    options, sums = WAYS.get(way, ({"parallel": "ddp"}, SUMS[0]))
    options = {**options, "micro_batch_size": 2, "max_grad_norm": max_norm}
    model = toy_model(dtype=torch.float32, tied=tied)
    stage = toy_stage(directory, [UNITS, UNITS], data=DATA, options=options, model=model, objective=SFTMix(mu=0.5))
    loop, taken = TrainingLoop(stage, world), dict[str, torch.Tensor]()
    reducing(loop.module, sums)

    def take(optimizer: Any, args: Any, kwargs: Any) -> None:
        named = unwrap(loop.module).model.named_parameters()
        for name, p in named:
            taken.setdefault(name, getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone())  # of the first step

    loop.optimizer.register_step_pre_hook(take)
    with Collectives() as moved:
        metrics = loop.advance()
    loop.advance()  # a second step goes through
    return [metrics[name] for name in ("loss", "ntp", "mixup", "grad_norm")], dict(taken), dict(moved.count)


def of_ranks(world: World, path: str) -> None:
    for way, tied in CASES:
        found = first_step(world, Path(path) / "stage", way, tied=tied)
        torch.save(found, Path(path) / f"{way}-{tied}-{world.rank}")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of a way: what `first_step` returned on each rank."""
    path = tmp_path_factory.mktemp("ranks")
    on_ranks(of_ranks, str(path), ranks=4)
    alone = cache(lambda tied: first_step(World(), path / "one", "one", tied=tied, max_norm=0.0))
    ranks = cache(lambda way, tied=False: [torch.load(path / f"{way}-{tied}-{rank}") for rank in range(4)])
    return SimpleNamespace(ranks=ranks, alone=alone)


@pytest.mark.parametrize(("way", "tied"), CASES)
def test_the_first_step_is_that_of_one_process(found, way, tied):
    """Sums of float32 in another order are off by few roundings of 6e-8; a factor, or a group counted twice, by more
    than a tenth. The norm is compared with the sum of squares of one process's gradients, in exact arithmetic."""
    of_one, gradients, _ = found.alone(tied)
    norm = math.sqrt(math.fsum(x * x for g in gradients.values() for x in g.flatten().double().tolist()))
    assert norm > 2 * MAX_NORM
    for metrics, mine, _ in found.ranks(way, tied):
        assert metrics[:3] == pytest.approx(of_one[:3], rel=1e-6)
        assert metrics[3] == pytest.approx(norm, rel=1e-6)
        assert mine.keys() == gradients.keys()
        for name, whole in gradients.items():
            clipped = whole * (MAX_NORM / norm)
            torch.testing.assert_close(mine[name], clipped, rtol=0, atol=1e-5 * float(clipped.abs().max()), msg=name)


@pytest.mark.parametrize("parallel", SHARDED)
def test_the_norm_is_one_number_of_the_group_that_shares_the_weights(found, parallel):
    """Beside what is sent of weights and gradients; over all ranks, copies of the weights would count twice."""
    for *_, moved in found.ranks(f"{parallel}, as it comes"):
        assert moved.get("all_reduce 1") == 1, moved


@pytest.mark.parametrize("parallel", SHARDED)
def test_each_micro_batch_is_reduced_if_asked_for(found, parallel):
    """Of token embeddings, two layers, last norm with head, and the rest (places)."""

    def reduced(way: str) -> int:
        moved = found.ranks(f"{parallel}, {way}")[0][2]
        return sum(n for name, n in moved.items() if name.startswith("reduce_scatter"))

    assert (reduced("as it comes"), reduced("each")) == (5, 5 * 2)


@pytest.mark.parametrize("parallel", SHARDED)
def test_layers_are_gathered_anew_for_the_backward_unless_they_are_kept(found, parallel):
    def gathered(way: str) -> int:
        moved = found.ranks(f"{parallel}, {way}")[0][2]
        return sum(n for name, n in moved.items() if name.startswith("all_gather"))

    assert gathered("kept") < gathered("as it comes")


def test_ddp_reduces_in_buckets(found):
    """And not gradient by gradient: all of this model fits into one of 1 MB."""
    numbers = sum(p.numel() for p in toy_model().parameters())
    for *_, moved in found.ranks("ddp"):
        assert moved[f"all_reduce {numbers}"] == 1
