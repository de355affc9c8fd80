"""What ranks send each other, against the collectives of real ranks (gloo)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.world import World
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.tools.estimate.machine import Layout
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.needs import traffic
from sftmix.tools.estimate.work import Amount, Work
from sftmix.training.module import TrainingModule, gradient_sync
from sftmix.training.parallel import recompute_activations, wrap
from sftmix.training.scoring import Scorer, scoring_plan
from tests.distributed.test_sharding import COUNTED
from tests.forked import on_ranks
from tests.tools.estimate.configs import batch, gpus, segment, small_llama
from tests.toy import toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"))


# --------------------------------------------------------------------------------------------- counted


class Moved(TorchDispatchMode):
    """Bytes that this rank passes on in collectives of a ring; whole tensors are gathered, reduced or averaged."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group, self.bytes = group, dict.fromkeys(COUNTED.values(), 0.0)
        self.copies = 2
        """Ranks that average."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = COUNTED.get(func.__name__.split(".")[0]) if func.namespace == "c10d" else None
        if name:
            whole = args[1] if name == "reduce_scatter" else args[0]
            size = sum(x.nbytes for x in ([whole] if isinstance(whole, torch.Tensor) else whole))
            ranks = self.copies if name == "all_reduce" else self.group
            self.bytes[name] += (1 + (name == "all_reduce")) * size * (ranks - 1) / ranks
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
    Way("fsdp"),
    Way("fsdp", "bf16"),
    Way("ddp", segments=2),
    Way("fsdp", segments=2),
    Way("fsdp", segments=2, micro_batches=1),
    Way("fsdp", segments=4, recompute=True),
    Way("fsdp", recompute=True),
    Way("fsdp", "bf16", lora=LoraOptions(r=2)),
]
HYBRID = [Way("hsdp"), Way("hsdp", "bf16"), Way("hsdp", segments=2)]


def counted(world: World, way: Way, path: str) -> list[float]:
    """Bytes of weights and of gradients in the second step, and of weights in scoring."""
    model = load_model(path)
    if way.lora.r:
        add_adapters(model, way.lora, seed=0)
    if way.recompute:
        recompute_activations(model)
    wrapping = {"parallel": way.parallel, "precision": way.precision, "shard_group_size": 2}
    module = wrap(TrainingModule(model), world=world, **wrapping)
    step = partial(a_step, module, way)
    step()
    with Moved(group=2) as moved:
        step()
    assert not way.parallel.endswith("fsdp") or not moved.bytes["all_reduce"]
    gradients = moved.bytes["reduce_scatter"] + moved.bytes["all_reduce"]
    Scorer(world=world)(module, DATA)
    with Moved(group=2) as read:  # embeddings and head are still there
        Scorer(world=world)(module, DATA)
    return [moved.bytes["all_gather"], gradients, read.bytes["all_gather"]]


def a_step(module: torch.nn.Module, way: Way) -> None:
    for number in range(way.micro_batches):
        given = collate([(Slot(k),) for k in range(4)], DATA, n_segments=way.segments)
        plan = scoring_plan(given)
        plan.row_weight.fill_(1.0)
        with gradient_sync(module, number == way.micro_batches - 1):
            module(given, plan).loss.backward()
    module.zero_grad(set_to_none=True)


def ranks_count(world: World, path: str, out: str, hybrid: bool) -> None:
    found = [counted(world, way, path) for way in (HYBRID if hybrid else WAYS)]
    Path(out, f"{hybrid}-{world.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def counts(tmp_path_factory, path) -> Path:
    out = tmp_path_factory.mktemp("counts")
    on_ranks(ranks_count, path, str(out), False)
    on_ranks(ranks_count, path, str(out), True, ranks=4)
    return out


def sent(path: str, ranks: int, lora: LoraOptions, micro_batches: float, passes: float, **options: Any) -> list[float]:
    """Estimated bytes of weights and gradients in a step, and of weights in a forward pass of scoring."""
    training, model = TrainingOptions(**options), FakeModel(path, None, lora)
    counts = {"micro_batches": micro_batches, "passes": passes, "largest": batch(segment(1, 2))}
    work = Work("train", path, lora, training, Amount(forwards=1), **counts)
    return [*traffic(work, model, Layout(training, gpus(ranks)))]


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [False, True], ids=["two-ranks", "four-ranks"])
def test_what_is_sent_is_what_ranks_send(counts, path, hybrid):
    told_by = range(4 if hybrid else 2)
    for rank in told_by:
        told = json.loads((counts / f"{hybrid}-{rank}.json").read_text())
        for way, found in zip(HYBRID if hybrid else WAYS, told, strict=True):
            options = {"parallel": way.parallel, "precision": way.precision, "shard_group_size": 2}
            numbers = (way.micro_batches, way.micro_batches * way.segments)
            assert found == pytest.approx(sent(path, len(told_by), way.lora, *numbers, **options), rel=1e-6), way
