"""FLOPs, traffic and memory of a stage, against torch's counter, real ranks, and formulas written out."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.components.optimizers import AdamW, AdamW8bit
from sftmix.functional.fused import default_chunk_size
from sftmix.model.adapters import add_adapters
from sftmix.model.layers import recompute_activations
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.tools.estimate.machine import layout_of
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.needs import forward_flops, memory_of, traffic, training_flops
from sftmix.tools.estimate.work import Work
from sftmix.training.module import TrainingModule, gradient_sync
from sftmix.training.parallel import wrap
from sftmix.training.scoring import scoring_plan
from tests.distributed.test_sharding import COUNTED
from tests.forked import on_ranks
from tests.tools.estimate.configs import LAYER, LAYERS, VOCABULARY, WIDTH, batch, machine, segment, small_llama
from tests.toy import toy_model, toy_rows

SHORT, LONG = segment(1, 2), segment(8, 64)
ENDS = 2 * VOCABULARY * WIDTH + WIDTH
NUMBERS = LAYERS * LAYER + ENDS
DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"))


def work_of(path: str, options: TrainingOptions, lora: LoraOptions, **given) -> Work:
    return Work("train", path, lora, options, np.zeros(3), **given)


def memory(path: str, *segments, count: int = 4, parallel: Any = "auto", lora=None, optimizer=None, **given) -> dict:
    """Estimated of a stage on H100s; accumulated: whether a step has other micro-batches."""
    lora = lora or LoraOptions()
    options = TrainingOptions(parallel=parallel, precision=given.get("precision", "bf16"))
    largest = batch(*segments, targets=given.get("targets", 1)) if segments else None
    work = work_of(path, options, lora, largest=largest, micro_batches=1 + given.get("accumulated", False))
    gpus, model = machine(gpus=count), FakeModel(path, None, lora)
    return memory_of(work, model, optimizer or AdamW(), layout_of(options, gpus), gpus, 0)


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


# ---------------------------------------------------------------------------------------- gradients


class Made(TorchDispatchMode):
    """Storages that operations return, as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, torch.dtype, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is torch.Tensor:
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), x.dtype, storage.nbytes())
        return out

    def floats(self) -> int:
        """Bytes of float32 that are held."""
        gc.collect()
        return sum(n for ref, kind, n in self.made.values() if kind == torch.float32 and not ref.expired())


def holds_gradients(world: World) -> None:
    """FSDP in bf16 holds the whole float32 gradient after a micro-batch that is not the last of its step; DDP's buckets
    outlive zero_grad(set_to_none=True)."""
    model = toy_model(dtype=torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    module = wrap(TrainingModule(model), parallel="fsdp", precision="bf16", world=world)
    given = collate([(Slot(0),), (Slot(1),)], DATA)
    plan = scoring_plan(given)
    plan.row_weight.fill_(1.0)
    with Made() as made, gradient_sync(module, enabled=False):
        module(given, plan).loss.backward()
    assert numbers * 4 <= made.floats() < numbers * 4.05
    module = wrap(TrainingModule(toy_model(dtype=torch.float32)), parallel="ddp", precision="fp32", world=world)
    for _ in range(2):
        module(given, plan).loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    refs = [StorageWeakRef(g.untyped_storage()) for g in gradients]
    del gradients
    module.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(ref.expired() for ref in refs)


@pytest.mark.slow
def test_fsdp_holds_the_whole_gradient_between_micro_batches_and_ddp_its_buckets():
    on_ranks(holds_gradients)


def test_so_does_the_estimate(path):
    one, several = (memory(path, SHORT, accumulated=accumulated) for accumulated in (False, True))
    assert one["gradients"] in (0, NUMBERS)
    assert several["gradients"] == 4 * NUMBERS
    assert several["peak"] - one["peak"] >= 4 * NUMBERS * 3 / 4
    # By the loss of a step's only micro-batch; its size makes that moment the peak.
    ddp, alone = (memory(path, LONG, parallel=kind, targets=400, count=n) for kind, n in (("ddp", 4), ("auto", 1)))
    assert ddp["loss"] > 0
    assert (ddp["gradients"], alone["gradients"]) == (4 * NUMBERS, 0)


def test_gradients_of_several_segments_are_summed_beside_those_of_micro_batches_before():
    """When the segment that is first in the backward is through, no parameter has a gradient: autograd holds them."""
    model = toy_model(dtype=torch.float32)
    layers = [p for block in model.transformer.h for p in block.parameters()]
    embed, held = model.get_input_embeddings(), []
    parts = [embed(torch.ones(1, length, dtype=torch.int64)).detach().requires_grad_() for length in (1, 2)]
    outputs = [model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state for x in parts]
    with Made() as made:
        parts[1].register_hook(lambda _: held.append((made.floats(), [p.grad for p in layers])))
        sum(x.sum() for x in outputs).backward()
    (bytes_held, given), numbers = held[0], sum(p.numel() for p in model.get_decoder().parameters())
    assert given == [None] * len(layers)
    assert 4 * sum(p.numel() for p in layers) <= bytes_held < 4 * numbers * 1.5


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_so_does_the_estimate_of_several_segments(path, precision, size):
    given = {"count": 1, "accumulated": True, "precision": precision, "targets": 400}
    assert memory(path, LONG, **given)["gradients"] == 4 * NUMBERS
    assert memory(path, segment(4, 64), segment(4, 60), **given)["gradients"] == (4 + size) * NUMBERS


# ----------------------------------------------------------------------------- shards, loss and optimizer


def test_what_ranks_share_is_divided_and_what_they_gather_is_not(path):
    """At the end of the backward, the gradient of embeddings and head, too, in bf16 and in the reduced buffer."""
    part = memory(path, SHORT)
    assert (part["weights"], part["optimizer"], part["activations"]) == (NUMBERS, 2 * NUMBERS, 0)
    gathered, reduced = 2 * (2 * LAYER + ENDS), (2 + 4) * (LAYER + ENDS)
    backward = FakeModel(path, None, LoraOptions()).saved([SHORT], "bfloat16", recompute=False)[1]
    assert part["working"] == pytest.approx(gathered + reduced + backward, abs=1)
    scores = memory(path)
    assert (scores["weights"], scores["working"], scores["peak"]) == (NUMBERS, gathered, NUMBERS + gathered)


def test_the_head_is_copied_by_autocast_alone(path):
    """Logits of 20 tokens, their block and gradients are the same; FSDP has gathered the head in bf16."""
    assert default_chunk_size(VOCABULARY, torch.device("cuda")) > 20
    ddp, fsdp = (memory(path, LONG, parallel=kind, accumulated=True, targets=20)["loss"] for kind in ("ddp", "fsdp"))
    assert ddp - fsdp == 2 * VOCABULARY * WIDTH
    logits, block, gradients = 2 * 20 * VOCABULARY, 3 * 4 * 20 * VOCABULARY, 4 * VOCABULARY * WIDTH + 8 * 20 * WIDTH
    assert fsdp == logits + block + gradients


def test_the_optimizer_says_what_its_state_needs_and_adapters_have_a_state_alone(path):
    for optimizer, size in ((AdamW(), 8), (AdamW8bit(), 2)):
        assert memory(path, SHORT, parallel="ddp", optimizer=optimizer)["optimizer"] == size * NUMBERS
    lora = LoraOptions(r=2)
    trained, part = FakeModel(path, None, lora).numbers.trained, memory(path, SHORT, count=1, lora=lora)
    assert trained > 0
    assert (part["weights"], part["optimizer"]) == (4 * (NUMBERS + trained), 8 * trained)
    assert part["gradients"] in (0, 4 * trained)


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
