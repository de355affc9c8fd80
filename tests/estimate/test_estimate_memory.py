"""Memory of a stage: what ranks share, hold whole or hold twice, against runs on ranks and formulas written out."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.components.optimizers import AdamW, AdamW8bit
from sftmix.estimate import make_machine
from sftmix.estimate.batches import MicroBatch
from sftmix.estimate.layout import Layout, check_sharded, make_layout
from sftmix.estimate.machine import Machine
from sftmix.estimate.memory import Memory, reading_memory, training_memory
from sftmix.estimate.model import FakeModel
from sftmix.estimate.trace import Segment
from sftmix.functional.fused import default_chunk_size
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.training.module import TrainingModule, gradient_sync
from sftmix.training.parallel import wrap
from sftmix.training.scoring import scoring_plan
from sftmix.types import Batch, Plan
from tests.estimate.configs import INNER, LAYERS, VOCABULARY, WIDTH, small_llama
from tests.toy import on_ranks, toy_model, toy_rows

LAYER = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
SEGMENTS = (Segment(1, 2),)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[bool, str]:
    """By whether the embeddings are tied."""
    return {tied: small_llama(tmp_path_factory.mktemp("llama"), tied=tied) for tied in (False, True)}


@dataclass
class Case:
    """A stage on H100s; `memory` is what is estimated."""

    path: str
    parallel: Any = "auto"
    gpus: int = 4
    accumulated: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)
    optimizer: Any = AdamW
    precision: Any = "bf16"
    segments: tuple[Segment, ...] = SEGMENTS
    targets: int = 1

    @property
    def model(self) -> FakeModel:
        return FakeModel(self.path, None, self.lora)

    @property
    def machine(self) -> Machine:
        return make_machine("H100", self.gpus, mfu=0.4, tflops=None)

    @property
    def options(self) -> TrainingOptions:
        return TrainingOptions(parallel=self.parallel, precision=self.precision)

    @property
    def layout(self) -> Layout:
        return make_layout(self.options, self.machine)

    @property
    def memory(self) -> Memory:
        batch = MicroBatch(self.segments, self.targets, self.accumulated)
        optimizer = self.optimizer()
        return training_memory(self.model, batch, self.options, optimizer, self.layout, self.machine, process=0.0)


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

    def bytes(self, dtype: torch.dtype | None = None, *, without: Iterable[torch.Tensor] = ()) -> int:
        """Of those that are held: of one dtype, or all; without the storages of some tensors."""
        gc.collect()
        left_out = {x.untyped_storage()._cdata for x in without}
        held = [(key, kind, n) for key, (ref, kind, n) in self.made.items() if not ref.expired()]
        return sum(n for key, kind, n in held if dtype in (None, kind) and key not in left_out)


def ntp_batch() -> tuple[Batch, Plan]:
    batch = collate([(Slot(0),), (Slot(1),)], toy_rows([(3, 5), (7, 2)]))
    plan = scoring_plan(batch)
    plan.row_weight.fill_(1.0)
    return batch, plan


def accumulates(world: World) -> None:
    """Forward and backward of a micro-batch that is not the last of its step, under FSDP in bf16."""
    model = toy_model(dtype=torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    module = wrap(TrainingModule(model), parallel="fsdp", precision="bf16", world=world)
    batch, plan = ntp_batch()
    with Made() as made, gradient_sync(module, enabled=False):
        module(batch, plan).loss.backward()
    assert numbers * 4 <= made.bytes(torch.float32) < numbers * 4.05


def test_fsdp_holds_the_whole_gradient_in_float32_between_micro_batches():
    on_ranks(accumulates)


def test_so_does_the_estimate(paths):
    one, several = (Case(paths[False], accumulated=accumulated) for accumulated in (False, True))
    numbers = one.model.numbers
    assert one.memory.gradients in (0, 4 * numbers / 4)
    assert several.memory.gradients == 4 * numbers
    assert several.memory.peak - one.memory.peak >= 4 * numbers * 3 / 4


def test_ddp_keeps_its_buckets_and_one_process_nothing(paths):
    """By the loss of a step's only micro-batch; more segments make that moment the peak."""

    def at_loss(parallel: str, gpus: int) -> float:
        memory = Case(paths[False], parallel, gpus, segments=(Segment(8, 64),), targets=400).memory
        assert memory.loss > 0
        return memory.gradients

    assert at_loss("ddp", 4) == 4 * Case(paths[False]).model.numbers
    assert at_loss("auto", 1) == 0


def ddp_buckets(world: World) -> None:
    """Whether the gradients' storage outlives zero_grad(set_to_none=True)."""
    module = wrap(TrainingModule(toy_model(dtype=torch.float32)), parallel="ddp", precision="fp32", world=world)
    batch, plan = ntp_batch()
    for _ in range(2):
        module(batch, plan).loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    refs = {g.untyped_storage()._cdata: StorageWeakRef(g.untyped_storage()) for g in gradients}
    del gradients
    module.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(ref.expired() for ref in refs.values())


def test_ddp_s_buckets_outlive_the_step():
    on_ranks(ddp_buckets)


def test_gradients_of_several_segments_are_summed_beside_those_of_micro_batches_before():
    """When the segment that is first in the backward is through, no parameter has a gradient: autograd holds them."""
    model = toy_model(dtype=torch.float32)
    model.zero_grad()
    layers = sum(p.numel() for block in model.transformer.h for p in block.parameters())
    embed, held = model.get_input_embeddings(), []
    parts = [embed(torch.ones(1, length, dtype=torch.int64)).detach().requires_grad_() for length in (1, 2)]
    outputs = [model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state for x in parts]
    with Made() as made:
        parts[1].register_hook(lambda gradient: held.append((made.bytes(torch.float32), model_gradients(model))))
        sum(x.sum() for x in outputs).backward()
    (bytes_held, given), numbers = held[0], sum(p.numel() for p in model.get_decoder().parameters())
    assert given == 0
    assert 4 * layers <= bytes_held < 4 * numbers * 1.5


def model_gradients(model: torch.nn.Module) -> int:
    return sum(1 for block in model.transformer.h for p in block.parameters() if p.grad is not None)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_so_does_the_estimate_of_several_segments(paths, precision, size):
    numbers = Case(paths[False]).model.numbers

    def gradients(*segments: Segment) -> float:
        case = Case(paths[False], gpus=1, accumulated=True, precision=precision, segments=segments, targets=400)
        assert case.memory.activations > 0
        return case.memory.gradients

    assert gradients(Segment(8, 64)) == 4 * numbers
    assert gradients(Segment(4, 64), Segment(4, 60)) == (4 + size) * numbers


# ---------------------------------------------------------------------------------------- shards


def test_what_ranks_share_is_divided_and_what_they_gather_is_not(paths):
    case = Case(paths[False])
    memory, numbers = case.memory, case.model.numbers
    assert (memory.weights, memory.optimizer) == (4 * numbers / 4, 8 * numbers / 4)
    ends = 2 * VOCABULARY * WIDTH + WIDTH
    assert numbers == LAYERS * LAYER + ends
    gathered, reduced = 2 * (2 * LAYER + ends), (2 + 4) * LAYER
    backward = case.model.saved_by_a_layer(SEGMENTS, "bfloat16")
    # the end of the backward: the gradient of embeddings and head, too, once in bf16 and once in the reduced buffer
    assert memory.activations == 0
    assert memory.working == pytest.approx(gathered + reduced + backward + (2 + 4) * ends)


def test_a_tied_head_has_two_gradients_at_the_end_of_the_backward(paths):
    case = Case(paths[True])
    ends = VOCABULARY * WIDTH + WIDTH
    backward = case.model.saved_by_a_layer(SEGMENTS, "bfloat16")
    assert case.memory.activations == 0
    once = 2 * (2 * LAYER + ends) + 6 * LAYER + backward + 6 * ends
    assert case.memory.working == pytest.approx(once + 2 * VOCABULARY * WIDTH)


def test_hsdp_shares_within_a_node(paths):
    def shards(gpus: int, group: int | None = None, per_node: int = 8) -> int:
        machine = make_machine("H100", gpus, mfu=0.4, tflops=None, per_node=per_node)
        return make_layout(TrainingOptions(parallel="hsdp", shard_group_size=group), machine).shards

    assert (shards(16), shards(4), shards(16, 2), shards(16, per_node=4)) == (8, 4, 2, 4)
    with pytest.raises(ConfigError, match="shard_group_size is 3, but there are 16 ranks; allowed: 1, 2, 4, 8, 16"):
        shards(16, 3)
    with pytest.raises(ConfigError, match="which means the 8 ranks of this node, but there are 12 ranks"):
        shards(12)


def test_a_model_that_only_scores_is_sharded_too(paths):
    case = Case(paths[False])
    memory = reading_memory(case.model, case.layout, process=0.0)
    assert memory.weights == case.model.numbers
    assert memory.working == 2 * (2 * LAYER + 2 * VOCABULARY * WIDTH + WIDTH)


# ------------------------------------------------------------------------------------ loss and optimizer


def test_the_head_is_copied_by_autocast_alone(paths):
    """Logits of 20 tokens, their block and gradients are the same; FSDP has gathered the head in bf16."""
    assert default_chunk_size(VOCABULARY, torch.device("cuda")) > 20
    long = {"accumulated": True, "segments": (Segment(8, 64),), "targets": 20}
    losses = {parallel: Case(paths[False], parallel, **long).memory.loss for parallel in ("ddp", "fsdp")}
    assert losses["ddp"] - losses["fsdp"] == 2 * VOCABULARY * WIDTH
    logits, block, gradients = 2 * 20 * VOCABULARY, 3 * 4 * 20 * VOCABULARY, 4 * VOCABULARY * WIDTH + 8 * 20 * WIDTH
    assert losses["fsdp"] == logits + block + gradients


def test_the_optimizer_says_what_its_state_needs(paths):
    class Momentum(AdamW):
        state_bytes = 4

    numbers = Case(paths[False]).model.numbers
    for optimizer, size in ((AdamW, 8), (AdamW8bit, 2), (Momentum, 4)):
        assert Case(paths[False], parallel="ddp", optimizer=optimizer).memory.optimizer == size * numbers


def test_adapters_have_state_and_gradients_alone(paths):
    case = Case(paths[False], gpus=1, lora=LoraOptions(r=2))
    trained, memory = case.model.trained, case.memory
    assert 0 < trained < case.model.numbers / 4
    assert memory.weights == 4 * case.model.numbers
    assert memory.optimizer == 8 * trained
    assert memory.gradients in (0, 4 * trained)


@pytest.mark.parametrize(
    ("lora", "optimizer", "message"),
    [
        (LoraOptions(), AdamW8bit(), "optimizer AdamW8bit and training.parallel auto .here fsdp. exclude each other"),
        (LoraOptions(r=4, quantize="4bit"), AdamW(), "quantize 4bit and training.parallel auto .here fsdp. exclude"),
    ],
)
def test_what_a_run_refuses_under_fsdp_is_refused(paths, lora, optimizer, message):
    alone, four = Case(paths[False], gpus=1), Case(paths[False])
    check_sharded(alone.layout, alone.options, lora, optimizer)
    with pytest.raises(ConfigError, match=message):
        check_sharded(four.layout, four.options, lora, optimizer)
