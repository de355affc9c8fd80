"""Activations of fake tensors against what autograd keeps of a real model: each precision, padded, packed, adapted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sftmix.estimate.model import QUANTIZED_BYTES, FakeModel
from sftmix.estimate.trace import Segment
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions
from sftmix.training.parallel import recompute_activations
from tests.estimate.test_estimate_memory import Made

NO_LORA, LORA = LoraOptions(), LoraOptions(r=4)
LAYERS = 6
FULL, MIXED = [Segment(4, 64)], [Segment(2, 48), Segment(1, 64), Segment(2, 20, "padded")]
PACKED = [Segment(1, 96, "packed")]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=96, max_position_embeddings=128, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def real_model(path: Path, attention: str = "sdpa", lora: LoraOptions = NO_LORA) -> PreTrainedModel:
    model = load_model(path, attention=attention)
    if lora.r:
        add_adapters(model, lora, seed=0)
    return model.train()


def inputs_of(segment: Segment) -> dict[str, Any]:
    """What training feeds the backbone: `sftmix.batches.collate` makes it of such lines."""
    ids = torch.ones(segment.rows, segment.width, dtype=torch.int64)
    if segment.content == "packed":
        positions = torch.cat([torch.arange(segment.width - 9), torch.arange(9)])[None]
        return {"input_ids": ids, "attention_mask": None, "position_ids": positions, "use_cache": False}
    mask = torch.ones_like(ids)
    if segment.content == "padded":
        mask[:, -7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def saved(model: PreTrainedModel, segments: Sequence[Segment], *, autocast: bool) -> int:
    """Bytes of the distinct storages that autograd saves, the parameters' left out."""
    own, kept, outputs = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for segment in segments:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                outputs.append(model.get_decoder()(**inputs_of(segment)))
    return sum(storage.nbytes() for storage in kept.values())


# ------------------------------------------------------------------------------------------ saved bytes


@pytest.mark.parametrize("compute", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("segments", [FULL, MIXED, PACKED], ids=["full", "mixed", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saved_bytes_are_those_that_autograd_saves(path, attention, segments, compute):
    real = real_model(path, attention)
    if compute == "bfloat16":  # as FSDP computes
        real = real.bfloat16()
    total = saved(real, segments, autocast=compute == "autocast")
    assert FakeModel(path, attention, NO_LORA).saved(segments, compute, recompute=False) == total


def test_the_precisions_differ_as_they_do(path):
    """What is at stake: the whole micro-batch in bf16 is much less than the same under autocast."""
    fake = FakeModel(path, "sdpa", NO_LORA)
    whole, mixed, half = (fake.saved(FULL, c, recompute=False) for c in ("float32", "autocast", "bfloat16"))
    assert half < 0.8 * mixed < 0.8 * whole


def test_a_mask_is_counted_where_something_is_masked_and_the_attention_wants_one(path):
    padded = [Segment(4, 64, "padded")]
    sdpa, flash = FakeModel(path, "sdpa", NO_LORA), FakeModel(path, "flash_attention_2", NO_LORA)
    full = sdpa.saved(FULL, "float32", recompute=False)
    assert sdpa.saved(padded, "float32", recompute=False) > full + LAYERS * 4 * 64 * 64
    assert flash.saved(padded, "float32", recompute=False) == full
    assert flash.saved([Segment(1, 256, "packed")], "float32", recompute=False) < 1.02 * full


def test_copies_of_the_weights_are_made_once_for_all_segments(path):
    one, four = (
        FakeModel(path, "sdpa", NO_LORA).saved([Segment(1, 8)] * n, "autocast", recompute=False) for n in (1, 4)
    )
    copies = 2 * LAYERS * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert four - copies == 4 * (one - copies)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters(path, autocast):
    """Under autocast each use of a frozen weight has a bf16 copy of its own."""
    compute = "autocast" if autocast else "float32"
    total = saved(real_model(path, lora=LORA), MIXED, autocast=autocast)
    assert FakeModel(path, "sdpa", LORA).saved(MIXED, compute, recompute=False) == total


# ----------------------------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_holds_what_the_forward_leaves_and_one_layer(path, autocast):
    real = real_model(path)
    one_layer = saved(real, [Segment(4, 64)], autocast=autocast) / LAYERS
    recompute_activations(real)
    with Made() as made, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [real.get_decoder()(**inputs_of(one)) for one in (Segment(4, 64), Segment(4, 64))]
        held = made.bytes(without=real.parameters())
    del outputs
    fake = FakeModel(path, "sdpa", NO_LORA).saved(FULL * 2, "autocast" if autocast else "float32", recompute=True)
    # Not in the estimate: outputs, final norm, cosines and sines.
    beside = 2 * 4 * 64 * 4 * (5 * 32 + 1) + 2 * 2 * 64 * 8 * 4
    assert fake - one_layer <= held <= fake - one_layer + beside


def test_inputs_of_layers_have_the_dtype_of_what_is_counted(path):
    seen: dict[str, set[torch.dtype]] = {}
    for name, model, autocast in (
        ("autocast", real_model(path), True),
        ("bfloat16", real_model(path).bfloat16(), False),
    ):
        dtypes = seen.setdefault(name, set())
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda m, args, dtypes=dtypes: dtypes.add(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.get_decoder()(**inputs_of(FULL[0]))
    assert seen == {"autocast": {torch.float32}, "bfloat16": {torch.bfloat16}}
    fake = FakeModel(path, "sdpa", NO_LORA)
    inputs = 4 * 64 * 32 * LAYERS
    left = {c: fake.saved(FULL, c, recompute=True) - fake.saved_by_a_layer(FULL, c) for c in ("float32", "bfloat16")}
    assert left == {"float32": 4 * inputs, "bfloat16": 2 * inputs}


# --------------------------------------------------------------------------------------------- four bits


class FourBits(torch.autograd.Function):
    """A matrix product as bitsandbytes has it: the weight is made anew in the backward, nothing is saved."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight, None


class FourBitLinear(nn.Linear):
    def forward(self, x):
        return FourBits.apply(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


def test_four_bit_layers_save_no_copies_and_keep_the_dtype_of_their_input(path):
    real = real_model(path, lora=LORA)
    for module in real.model.layers.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.__class__ = FourBitLinear
    with torch.autocast("cpu", torch.bfloat16):
        out = real.get_decoder()(**inputs_of(FULL[0])).last_hidden_state.sum()
    out.backward()  # the stand-in is one that trains
    total = saved(real, MIXED, autocast=True)
    quantized = FakeModel(path, "sdpa", LoraOptions(r=4, quantize="4bit"))
    assert quantized.saved(MIXED, "autocast", recompute=False) == total
    assert total != FakeModel(path, "sdpa", LORA).saved(MIXED, "autocast", recompute=False)


def test_four_bits_are_for_the_layers_alone(path):
    """Embeddings, head, norms and adapters stay float32 (bitsandbytes leaves them, load_model loads them so)."""
    fake = FakeModel(path, "sdpa", LoraOptions(r=4, quantize="4bit"))
    real = real_model(path, lora=LORA)
    frozen = [p for p in real.model.layers.parameters() if p.dim() == 2 and not p.requires_grad]
    in_4_bits = sum(p.numel() for p in frozen)
    others = sum(p.numel() for p in real.parameters()) - in_4_bits
    assert fake.stored_bytes == 4 * others + QUANTIZED_BYTES * in_4_bits
    assert fake.stored_bytes > 4 * 2 * 96 * 32
    assert copy.deepcopy(FakeModel(path, "sdpa", LORA)).stored_bytes == 4 * (others + in_4_bits)
