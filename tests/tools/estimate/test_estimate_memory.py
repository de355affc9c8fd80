"""Memory of a stage: what ranks share, hold whole or hold twice, against runs on ranks and formulas written out."""

from __future__ import annotations

import gc
from collections.abc import Iterable
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
from sftmix.functional.fused import default_chunk_size
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.tools.estimate.machine import Layout
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.needs import memory_of
from sftmix.tools.estimate.work import Amount, Work
from sftmix.training.module import TrainingModule, gradient_sync
from sftmix.training.parallel import wrap
from sftmix.training.scoring import scoring_plan
from sftmix.types import Batch, Plan
from tests.forked import on_ranks
from tests.tools.estimate.configs import LAYER, LAYERS, VOCABULARY, WIDTH, batch, gpus, segment, small_llama
from tests.toy import toy_model, toy_rows

SHORT, LONG = segment(1, 2), segment(8, 64)
ENDS = 2 * VOCABULARY * WIDTH + WIDTH
NUMBERS = LAYERS * LAYER + ENDS


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[bool, str]:
    """By whether the embeddings are tied."""
    return {tied: small_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=tied) for tied in (False, True)}


def memory(path: str, *segments, count: int = 4, parallel: Any = "auto", lora=None, optimizer=None, **given) -> dict:
    """Estimated of a stage on H100s; accumulated: whether a step has other micro-batches."""
    lora = lora or LoraOptions()
    options = TrainingOptions(parallel=parallel, precision=given.get("precision", "bf16"))
    largest = batch(*segments, targets=given.get("targets", 1)) if segments else None
    accumulated = given.get("accumulated", False)
    work = Work("train", path, lora, options, Amount(), largest=largest, accumulated=accumulated)
    return memory_of(work, FakeModel(path, None, lora), optimizer or AdamW(), Layout(options, gpus(count)), 0)


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
    made = collate([(Slot(0),), (Slot(1),)], toy_rows([(3, 5), (7, 2)]))
    plan = scoring_plan(made)
    plan.row_weight.fill_(1.0)
    return made, plan


def holds_gradients(world: World) -> None:
    """FSDP in bf16 holds the whole float32 gradient after a micro-batch that is not the last of its step; DDP's buckets
    outlive zero_grad(set_to_none=True)."""
    model = toy_model(dtype=torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    module = wrap(TrainingModule(model), parallel="fsdp", precision="bf16", world=world)
    given, plan = ntp_batch()
    with Made() as made, gradient_sync(module, enabled=False):
        module(given, plan).loss.backward()
    assert numbers * 4 <= made.bytes(torch.float32) < numbers * 4.05
    module = wrap(TrainingModule(toy_model(dtype=torch.float32)), parallel="ddp", precision="fp32", world=world)
    for _ in range(2):
        module(given, plan).loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    refs = {g.untyped_storage()._cdata: StorageWeakRef(g.untyped_storage()) for g in gradients}
    del gradients
    module.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(ref.expired() for ref in refs.values())


@pytest.mark.slow
def test_fsdp_holds_the_whole_gradient_between_micro_batches_and_ddp_its_buckets():
    on_ranks(holds_gradients)


def test_so_does_the_estimate(paths):
    one, several = (memory(paths[False], SHORT, accumulated=accumulated) for accumulated in (False, True))
    assert one["gradients"] in (0, NUMBERS)
    assert several["gradients"] == 4 * NUMBERS
    assert several["peak"] - one["peak"] >= 4 * NUMBERS * 3 / 4
    # By the loss of a step's only micro-batch; its size makes that moment the peak.
    ddp, alone = (
        memory(paths[False], LONG, parallel=kind, targets=400, count=n) for kind, n in (("ddp", 4), ("auto", 1))
    )
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
        parts[1].register_hook(lambda _: held.append((made.bytes(torch.float32), [p.grad for p in layers])))
        sum(x.sum() for x in outputs).backward()
    (bytes_held, given), numbers = held[0], sum(p.numel() for p in model.get_decoder().parameters())
    assert given == [None] * len(layers)
    assert 4 * sum(p.numel() for p in layers) <= bytes_held < 4 * numbers * 1.5


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_so_does_the_estimate_of_several_segments(paths, precision, size):
    given = {"count": 1, "accumulated": True, "precision": precision, "targets": 400}
    assert memory(paths[False], LONG, **given)["gradients"] == 4 * NUMBERS
    assert memory(paths[False], segment(4, 64), segment(4, 60), **given)["gradients"] == (4 + size) * NUMBERS


# ---------------------------------------------------------------------------------------- shards


def test_what_ranks_share_is_divided_and_what_they_gather_is_not(paths):
    """At the end of the backward, the gradient of embeddings and head, too, once in bf16 and once in the reduced
    buffer; of a tied head twice in bf16."""
    for tied, ends in ((False, ENDS), (True, ENDS - VOCABULARY * WIDTH)):
        found, fake = memory(paths[tied], SHORT), FakeModel(paths[tied], None, LoraOptions())
        numbers = LAYERS * LAYER + ends
        assert (fake.numbers.all, fake.is_tied) == (numbers, tied)
        assert (found["weights"], found["optimizer"], found["activations"]) == (numbers, 2 * numbers, 0)
        gathered, reduced = 2 * (2 * LAYER + ends), (2 + 4) * (LAYER + ends)
        backward = fake.saved([SHORT], "bfloat16", recompute=False)[1]
        assert found["working"] == pytest.approx(gathered + reduced + backward + 2 * VOCABULARY * WIDTH * tied, abs=1)
        scores = memory(paths[tied])
        assert (scores["weights"], scores["working"], scores["peak"]) == (numbers, gathered, numbers + gathered)


def test_hsdp_shares_within_a_node():
    def shards(count: int, group: int | None = None, per_node: int = 8) -> int:
        options = TrainingOptions(parallel="hsdp", shard_group_size=group)
        return Layout(options, gpus(count, gpus_per_node=per_node)).shards

    assert (shards(16), shards(4), shards(16, 2), shards(16, per_node=4)) == (8, 4, 2, 4)
    with pytest.raises(ConfigError, match="shard_group_size is 3, but there are 16 ranks; allowed: 1, 2, 4, 8, 16"):
        shards(16, 3)
    with pytest.raises(ConfigError, match="shard_group_size is 8, but there are 12 ranks"):
        shards(12)


# ------------------------------------------------------------------------------------ loss and optimizer


def test_the_head_is_copied_by_autocast_alone(paths):
    """Logits of 20 tokens, their block and gradients are the same; FSDP has gathered the head in bf16."""
    assert default_chunk_size(VOCABULARY, torch.device("cuda")) > 20
    ddp, fsdp = (
        memory(paths[False], LONG, parallel=parallel, accumulated=True, targets=20)["loss"]
        for parallel in ("ddp", "fsdp")
    )
    assert ddp - fsdp == 2 * VOCABULARY * WIDTH
    logits, block, gradients = 2 * 20 * VOCABULARY, 3 * 4 * 20 * VOCABULARY, 4 * VOCABULARY * WIDTH + 8 * 20 * WIDTH
    assert fsdp == logits + block + gradients


def test_the_optimizer_says_what_its_state_needs(paths):
    class Momentum(AdamW):
        state_bytes = 4

    for optimizer, size in ((AdamW, 8), (AdamW8bit, 2), (Momentum, 4)):
        found = memory(paths[False], SHORT, parallel="ddp", optimizer=optimizer())
        assert found["optimizer"] == size * NUMBERS


def test_adapters_have_state_and_gradients_alone(paths):
    found, fake = (
        memory(paths[False], SHORT, count=1, lora=LoraOptions(r=2)),
        FakeModel(paths[False], None, LoraOptions(r=2)),
    )
    trained = fake.numbers.trained
    assert 0 < trained == fake.numbers.all - NUMBERS
    assert (found["weights"], found["optimizer"]) == (4 * fake.numbers.all, 8 * trained)
    assert found["gradients"] in (0, 4 * trained)
