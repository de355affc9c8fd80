"""The sizes of a fake model against the real one: its numbers, and what autograd keeps in each precision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, MambaConfig, MixtralConfig, PreTrainedModel

from sftmix.common.errors import ConfigError
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions
from sftmix.tools.estimate.machine import Compute
from sftmix.tools.estimate.model import QUANTIZED_BYTES, FakeModel
from sftmix.training.module import attention_inputs
from sftmix.types import Segment
from tests.tools.estimate.configs import LAYERS, VOCABULARY, WIDTH, segment, small_llama

NO_LORA, LORA, QLORA = LoraOptions(), LoraOptions(r=4), LoraOptions(r=4, quantize="4bit")
FULL, MIXED = [segment(4, 64)], [segment(2, 48), segment(1, 64), segment(2, 20, "padded")]
PACKED = [segment(1, 96, "packed")]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"), num_key_value_heads=2)


def real_model(path: str, attention: str = "sdpa", lora: LoraOptions = NO_LORA) -> PreTrainedModel:
    model = load_model(path, attention=attention)
    if lora.r:
        add_adapters(model, lora, seed=0)
    return model.train()


def saved(model: PreTrainedModel, segments: Sequence[Segment], *, autocast: bool) -> int:
    """Bytes of the distinct storages that autograd saves, the parameters' left out."""
    own, kept, outputs = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for one in segments:
            inputs: dict[str, Any] = {"input_ids": one.input_ids, **attention_inputs(one)}
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                outputs.append(model.get_decoder()(**inputs, use_cache=False).last_hidden_state)
    if model.training and len(outputs) == 1:
        outputs[0].sum().backward()  # what stands in for 4-bit layers is something that trains
    return sum(storage.nbytes() for storage in kept.values())


def kept(fake: FakeModel, segments: Sequence[Segment], compute: Compute = "float32") -> float:
    """The same as the estimate has it."""
    return fake.saved(segments, compute, recompute=False)[0]


def test_numbers_are_those_of_the_real_model(path, tmp_path):
    real, fake = load_model(path), FakeModel(path, None, NO_LORA)
    assert fake.numbers == (sum(p.numel() for p in real.parameters()),) * 2
    assert fake.head_shape == tuple(real.get_output_embeddings().weight.shape)
    assert fake.per_token.all == sum(p.numel() for x in real.model.layers for p in x.parameters() if p.dim() == 2)
    adapted = FakeModel(path, None, LoraOptions(r=4, target_modules=["q_proj"]))
    assert adapted.numbers.trained == LAYERS * 2 * 4 * WIDTH
    assert adapted.numbers.all == fake.numbers.all + adapted.numbers.trained
    assert not adapted.head_is_trained
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=512).save_pretrained(tmp_path / "gpt2")
    gpt2 = FakeModel(tmp_path / "gpt2", None, NO_LORA)
    assert gpt2.per_token.all == 2 * 12 * 16 * 16  # 512 learned positions are looked up, not multiplied with
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50}
    MambaConfig(**sizes, architectures=["MambaForCausalLM"]).save_pretrained(tmp_path / "mamba")
    mamba = FakeModel(tmp_path / "mamba", None, NO_LORA)
    assert (mamba.attention_width, mamba.n_layers) == (0, 2)  # and not 4: each block has a mixer, which is none


@pytest.mark.parametrize("kind", ["routed experts", "growing rope"])
def test_a_model_that_looks_at_values_is_refused_with_another_way(kind, tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "routed experts":
        MixtralConfig(**sizes, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    else:
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        LlamaConfig(**sizes, rope_parameters=rope, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path: estimate cannot follow .* --training\.max_steps 2"):
        kept(FakeModel(str(tmp_path), None, NO_LORA), FULL)


@pytest.mark.parametrize("compute", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("segments", [FULL, MIXED, PACKED], ids=["full", "mixed", "packed"])
@pytest.mark.parametrize(("attention", "lora"), [("sdpa", NO_LORA), ("eager", NO_LORA), ("sdpa", LORA)])
def test_saved_bytes_are_those_that_autograd_saves(path, attention, lora, segments, compute):
    """With adapters, too: under autocast each use of a frozen weight has a bf16 copy of its own."""
    real = real_model(path, attention, lora)
    if compute == "bfloat16":  # as FSDP computes
        real = real.bfloat16()
    total = saved(real, segments, autocast=compute == "autocast")
    assert kept(FakeModel(path, attention, lora), segments, compute) == total


def test_weights_that_are_stored_in_bf16_are_trained_in_float32(path, tmp_path):
    """The config names the dtype of the files; a run loads float32."""
    options = json.loads((Path(path) / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert kept(FakeModel(tmp_path, "sdpa", NO_LORA), FULL) == kept(FakeModel(path, "sdpa", NO_LORA), FULL)


def test_a_mask_is_counted_where_something_is_masked_and_the_attention_wants_one(path):
    sdpa, flash = FakeModel(path, "sdpa", NO_LORA), FakeModel(path, "flash_attention_2", NO_LORA)
    padded, full = [segment(4, 64, "padded")], kept(sdpa, FULL)
    assert kept(sdpa, padded) > full + LAYERS * 4 * 64 * 64
    assert kept(flash, padded) == full
    assert kept(flash, [segment(1, 256, "packed")]) < 1.02 * full


@pytest.mark.parametrize(("compute", "size"), [("float32", 4), ("autocast", 4), ("bfloat16", 2)])
def test_recomputation_holds_the_inputs_of_layers_and_one_layer(path, compute, size):
    model = FakeModel(path, "sdpa", NO_LORA)
    whole, layer = model.saved(FULL, compute, recompute=False)
    held, one = model.saved(FULL * 2, compute, recompute=True)
    copies = 2 * model.per_token.all * (compute == "autocast")
    assert one == layer == whole / LAYERS
    assert held - copies - layer == pytest.approx(size * 2 * 4 * 64 * WIDTH * LAYERS, rel=1e-12)


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
    """Embeddings, head, norms and adapters stay float32 (bitsandbytes leaves them, load_model loads them so)."""
    real, fake = real_model(path, lora=LORA), FakeModel(path, "sdpa", QLORA)
    in_4_bits = sum(p.numel() for p in real.model.layers.parameters() if p.dim() == 2 and not p.requires_grad)
    others = sum(p.numel() for p in real.parameters()) - in_4_bits
    assert others > 2 * VOCABULARY * WIDTH
    assert fake.stored_bytes == 4 * others + QUANTIZED_BYTES * in_4_bits
    read = FakeModel(path, "sdpa", QLORA.without_adapters())
    assert read.stored_bytes == fake.stored_bytes - 4 * fake.numbers.trained
    for module in real.model.layers.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.__class__ = FourBitLinear
    for segments in (FULL, MIXED):
        assert kept(fake, segments, "autocast") == saved(real, segments, autocast=True)
