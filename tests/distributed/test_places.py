"""Objectives with passes of their own on two real ranks, DDP and FSDP2: the gradients are those of one process.

Rank 1 has no pair in one micro-batch and nothing but a filler in the next, and makes as many passes as rank 0.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftmix.batches.collate import collate
from sftmix.common.world import World
from sftmix.components import EAFT, CutMix, EmbeddingMixup, ManifoldMixup, MixtureDivergence
from sftmix.training.module import TrainingModule, gradient_sync, unwrap
from sftmix.training.parallel import wrap
from sftmix.training.step import normalise
from tests.distributed.test_sharding import DATA, MU, WINDOW
from tests.forked import on_ranks
from tests.toy import toy_model

pytestmark = pytest.mark.slow

OBJECTIVES = [EmbeddingMixup(mu=MU), ManifoldMixup(mu=MU, layers=1), CutMix(mu=MU), MixtureDivergence(mu=MU)]
OBJECTIVES += [EAFT(mixup=EmbeddingMixup(mu=MU))]
NAMES = [type(objective).__name__ for objective in OBJECTIVES]


def gradients(world: World, parallel: str, number: int, shares: list[int]) -> dict[str, torch.Tensor]:
    """The gradients of the window: of this rank's share on two ranks, of both shares in one process."""
    objective, module = OBJECTIVES[number], TrainingModule(toy_model(tied=True), chunk_size=4)
    module = wrap(module, parallel=parallel, precision="fp32", world=world)
    batches = [collate(ranks[share], DATA, n_segments=1) for ranks in WINDOW for share in shares]
    plans = []
    for batch in batches:
        plan = objective.plan(batch, step=1, total_steps=2, seed=0)
        wide = {name: getattr(plan, name).double() for name in ("row_weight", "pair_weight", "lam")}
        plans.append(replace(plan, **wide))
    ntp, mixup = world.sum([sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans)])
    for k, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=world.size)
        with gradient_sync(module, k == len(batches) - 1):
            module(batch, scaled, loss=objective.loss).loss.backward()
    whole = {
        n: p.grad.full_tensor() if parallel == "fsdp" else p.grad for n, p in unwrap(module).model.named_parameters()
    }
    return {name: gradient.clone().contiguous() for name, gradient in whole.items()}


def rank_work(world: World, path: str) -> None:
    for parallel in ("ddp", "fsdp"):
        for number, name in enumerate(NAMES):
            found = gradients(world, parallel, number, [world.rank])
            save_file(found, Path(path) / f"{parallel}-{name}-{world.rank}.safetensors")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    on_ranks(rank_work, str(path))
    return path


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_two_ranks_are_those_of_one_process(ranks, parallel, name):
    expected = gradients(World(), "none", NAMES.index(name), [0, 1])
    for rank in (0, 1):
        found = load_file(ranks / f"{parallel}-{name}-{rank}.safetensors")
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-10)
