"""Ranks round the weights that they share, each its own rows, to the bits of one process."""

from pathlib import Path

import pytest
import torch

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import NTP
from sftmix.config import RunConfig
from sftmix.pipeline.loaded import round_weights
from sftmix.ranks.world import World
from sftmix.training.checkpoint import full_weights
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import wrap
from tests.forked import on_ranks
from tests.toy import toy_model, toy_rows
from tests.trained import assert_exact

pytestmark = pytest.mark.slow

WAYS = {"ddp": None, "fsdp": None, "hsdp": 2}
"""Way -> shard_group_size."""
DATA = toy_rows([(3, 5), (7, 2)])


def rounded(parallel: str, tied: bool, world: World) -> dict[str, torch.Tensor]:
    """The weights after a forward, which leaves those outside of the layers gathered, and after rounding."""
    module = TrainingModule(toy_model(tied=tied).float())
    module = wrap(module, parallel=parallel, precision="fp32", world=world, shard_group_size=WAYS.get(parallel))
    batch = collate([(Slot(0),), (Slot(1),)], DATA)
    plan = NTP().plan(batch, step=0, total_steps=1, seed=0)
    with torch.no_grad():
        before = float(module(batch, plan).loss)
        round_weights(RunConfig(seed=3), module, torch.bfloat16)
        assert float(module(batch, plan).loss) != before  # what is computed with is rounded, too
    return {name: x.clone() for name, x in full_weights(module).items()}


def rank_work(world: World, path: str) -> None:
    for parallel in WAYS:
        for tied in (True, False):
            weights = rounded(parallel, tied, world)
            if world.is_main:
                torch.save(weights, Path(path) / f"{parallel}-{tied}")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    on_ranks(rank_work, str(path))
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("parallel", WAYS)
def test_two_ranks_round_as_one(found, parallel, tied):
    alone = rounded("none", tied, World())
    original = toy_model(tied=tied).float().state_dict()
    assert all(torch.equal(x, x.bfloat16().float()) for x in alone.values())
    assert any(not torch.equal(x, original[name].bfloat16().float()) for name, x in alone.items())
    assert_exact(torch.load(found / f"{parallel}-{tied}"), alone)
