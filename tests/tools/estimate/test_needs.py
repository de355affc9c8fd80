"""FLOPs, traffic and memory of a stage, against torch's counter, real ranks, and formulas written out."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.model.adapters import add_adapters
from sftmix.model.layers import recompute_activations
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.tools.estimate.machine import layout_of
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.needs import forward_flops, traffic, training_flops
from sftmix.tools.estimate.work import Work
from sftmix.training.module import TrainingModule, gradient_sync
from sftmix.training.parallel import wrap
from sftmix.training.scoring import scoring_plan
from tests.distributed.test_sharding import COUNTED
from tests.forked import on_ranks
from tests.tools.estimate.configs import LAYER, LAYERS, VOCABULARY, WIDTH, machine, segment, small_llama
from tests.toy import toy_rows

SHORT, LONG = segment(1, 2), segment(8, 64)
ENDS = 2 * VOCABULARY * WIDTH + WIDTH
NUMBERS = LAYERS * LAYER + ENDS
DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"))


def work_of(path: str, options: TrainingOptions, lora: LoraOptions, **given) -> Work:
    return Work("train", path, lora, options, np.zeros(3), **given)


def test_flops_are_those_that_torch_counts(path):
    """torch counts whole attention matrices, of which a causal mask needs half; so the squares count twice here."""
    fake, real = FakeModel(path, "sdpa", LoraOptions()), load_model(path, attention="eager").eval()
    with FlopCounterMode(display=False) as forward:
        loss = real(input_ids=torch.ones(1, 24, dtype=torch.int64)).logits.sum()
    amount = np.array([24, 24, 2 * 24**2])
    assert sum(forward_flops(fake, amount)) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert training_flops(fake, amount, recompute=False) == both
    head = forward_flops(fake, amount)[2]
    assert training_flops(fake, amount, recompute=True) == both + forward.get_total_flops() - head


def test_hsdp_shares_within_a_node():
    def shards(count: int, group: int | None = None, per_node: int = 8) -> int:
        options = TrainingOptions(parallel="hsdp", shard_group_size=group)
        return layout_of(options, machine(gpus=count, gpus_per_node=per_node)).shards

    assert (shards(16), shards(4), shards(16, 2), shards(16, per_node=4)) == (8, 4, 2, 4)
    with pytest.raises(ConfigError, match="shard_group_size is 8, but there are 12 ranks"):
        shards(12)


# ------------------------------------------------------------------------------------------------ traffic


class Moved(TorchDispatchMode):
    """Bytes that this rank passes on in collectives of a ring; whole tensors are gathered, reduced or averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(COUNTED.values(), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = COUNTED.get(func.__name__.split(".")[0]) if func.namespace == "c10d" else None
        if name:
            whole = args[1] if name == "reduce_scatter" else args[0]
            size = sum(x.nbytes for x in ([whole] if isinstance(whole, torch.Tensor) else whole))
            self.bytes[name] += (1 + (name == "all_reduce")) * size / 2  # in groups of two ranks
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Way:
    """How ranks work together; so many micro-batches of so many segments make a step."""

    parallel: Any
    precision: Any = "fp32"
    segments: int = 1
    micro_batches: int = 2
    recompute: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)


WAYS = [
    Way("ddp"),
    Way("ddp", segments=2),
    Way("fsdp", "bf16"),
    Way("fsdp", segments=2),
    Way("fsdp", segments=2, micro_batches=1),
    Way("fsdp", segments=4, recompute=True),
    Way("fsdp", "bf16", lora=LoraOptions(r=2)),
]
HYBRID = [Way("hsdp", "bf16"), Way("hsdp", segments=2)]


def counted(world: World, way: Way, path: str) -> list[float]:
    """Bytes of weights and of gradients in the second step."""
    model = load_model(path)
    if way.lora.r:
        add_adapters(model, way.lora, seed=0)
    if way.recompute:
        recompute_activations(model)
    wrapping = {"parallel": way.parallel, "precision": way.precision, "shard_group_size": 2}
    step = partial(a_step, wrap(TrainingModule(model), world=world, **wrapping), way)
    step()
    with Moved() as moved:
        step()
    assert not way.parallel.endswith("fsdp") or not moved.bytes["all_reduce"]
    return [moved.bytes["all_gather"], moved.bytes["reduce_scatter"] + moved.bytes["all_reduce"]]


def a_step(module: torch.nn.Module, way: Way) -> None:
    for number in range(way.micro_batches):
        given = collate([(Slot(k),) for k in range(4)], DATA, n_segments=way.segments)
        plan = scoring_plan(given)
        plan.row_weight.fill_(1.0)
        with gradient_sync(module, number == way.micro_batches - 1):
            module(given, plan).loss.backward()
    module.zero_grad(set_to_none=True)


def ranks_count(world: World, path: str, out: str, ways: list[Way]) -> None:
    Path(out, f"{world.rank}.json").write_text(json.dumps([counted(world, way, path) for way in ways]))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "ways"), [(2, WAYS), (4, HYBRID)], ids=["two-ranks", "four-ranks"])
def test_what_is_sent_is_what_ranks_send(path, tmp_path, ranks, ways):
    on_ranks(ranks_count, path, str(tmp_path), ways, ranks=ranks)
    for rank in range(ranks):
        for way, sent in zip(ways, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            options = TrainingOptions(parallel=way.parallel, precision=way.precision, shard_group_size=2)
            counts = {"micro_batches": way.micro_batches, "passes": way.micro_batches * way.segments}
            work, model = work_of(path, options, way.lora, **counts), FakeModel(path, None, way.lora)
            assert sent == pytest.approx([*traffic(work, model, layout_of(options, machine(gpus=ranks)))], rel=1e-6), (
                way
            )
