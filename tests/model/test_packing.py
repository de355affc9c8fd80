"""Packed documents do not see each other: hidden states and gradients are those of every document alone (T12)."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, masking_utils
from transformers.models.llama.modeling_llama import eager_attention_forward as eager

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.model.head import check_head
from sftmix.model.packing import is_skipping, known_rows, packing_problem
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import training_module
from sftmix.types import Encoded
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.model.test_models import TINY
from tests.model.test_models import random_model as build
from tests.toy import ToyRows

SLIDING, ALL = {"sliding_window": 4}, ("sdpa", "eager", "varlen")
FAMILIES = {
    "llama": ("Llama", TINY, ALL),
    "qwen2": ("Qwen2", TINY, ALL),
    "qwen3": ("Qwen3", TINY, ALL),
    "mistral, sliding": ("Mistral", TINY | SLIDING, ALL),
    "gemma2, sliding": ("Gemma2", TINY | SLIDING, ("eager",)),
    "gemma3, sliding": ("Gemma3Text", TINY | SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}, ALL),
}
WINDOWED = TINY | {
    "num_key_value_heads": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
WINDOWED |= {"q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "hc_mult": 3, "max_position_embeddings": 1024}
"""Layers that see windows of 128 tokens, each as one."""
LEAKY = {
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        "vocab_size": 61,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "mamba": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "deepseek_v4": WINDOWED | {"layer_types": ["heavily_compressed_attention"] * 2},
}
CASES = [(family, attention) for family, (_, _, kinds) in FAMILIES.items() for attention in kinds]
WINDOWS = ((9, 6, 8), (23,), (7, 1, 15), (5, 7), (4,))
"""Lengths of the documents of each window: full ones, and the short last of a data set."""


def model_of(family, attention):
    name, options, _ = FAMILIES[family]
    return build(getattr(transformers, f"{name}Config")(**options), attention)


def rows():
    rng = np.random.default_rng(3)
    encoded = []
    for row, lengths in enumerate(WINDOWS):
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        target = np.ones(sum(lengths), dtype=bool)
        target[starts] = False
        encoded.append(Encoded(row, f"w{row}", rng.integers(3, 61, sum(lengths)), target, starts=starts))
    return ToyRows(encoded)


def alone(model, data):
    """Hidden states that predict the targets, from one forward pass for each document."""
    parts = []
    for window, lengths in zip(data, WINDOWS, strict=True):
        for document in np.split(window.input_ids, np.cumsum(lengths)[:-1]):
            ids = torch.from_numpy(document)[None]
            parts.append(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :-1])
    return torch.cat(parts)


def gradients_of_states(model, hidden):
    model.zero_grad()
    weights = torch.sin(torch.arange(hidden.numel(), dtype=torch.float32)).view_as(hidden)
    (hidden * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(model):
    """The module that a stage of packed documents trains."""
    return training_module(model, TrainingOptions(), precision="fp32", world=World(), packed=True, trains=True)


@pytest.mark.parametrize("layout", [{}, {"n_segments": 3}, {"padding_free": True}], ids=str)
@pytest.mark.parametrize(("family", "attention"), some_fast(CASES, every=3))
def test_packed_documents_have_the_states_and_gradients_they_have_alone(family, attention, layout):
    """In lines of one window each, and with all windows in one row."""
    model, data = model_of(family, attention), rows()
    batch = collate([(Slot(row),) for row in range(len(data))], data, **layout)
    ours, expected = TrainingModule(model).hidden_states(batch), alone(model, data)
    assert ours.shape == expected.shape == (sum(sum(w) - len(w) for w in WINDOWS), 32)
    assert (ours - expected).abs().max() < 1e-5
    got, right = gradients_of_states(model, ours), gradients_of_states(model, expected)
    assert got.keys() == right.keys()
    assert max(float((got[k] - right[k]).abs().max() / (1 + right[k].abs().max())) for k in got) < 1e-5
    packed(model)


def test_windows_that_share_a_row_begin_their_documents_one_after_the_other():
    lengths = [length for window in WINDOWS for length in window]
    (row,) = collate([(Slot(row),) for row in range(len(WINDOWS))], rows(), padding_free=True).segments
    assert row.starts.tolist() == [0, *np.cumsum(lengths)]
    assert row.position_ids.tolist() == [[place for length in lengths for place in range(length)]]


@pytest.mark.parametrize("family", LEAKY)
def test_models_that_let_documents_leak_are_refused(family):
    model = build(transformers.AutoConfig.for_model(family, **LEAKY[family]), "eager")
    with pytest.raises(ConfigError, match=r"does not keep packed documents apart(.|\n)*data.packing to false"):
        packed(model)
    assert "does not keep packed documents apart" in (packing_problem(model, padding_free=True) or "")


def test_attention_without_masks_of_its_own_is_refused():
    """An attention that transformers builds no mask for sees no positions either."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("unmasked", sdpa_attention_forward)
    with pytest.raises(ConfigError, match="attention unmasked"):
        packed(build(transformers.LlamaConfig(**TINY), "unmasked"))


def flash_of_a_test(module, query, key, value, attention_mask, **more):
    """As flash attention, it has no float32."""
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return eager(module, query, key, value, None, **more)


def test_the_head_is_checked_without_flash_attention():
    """A model comes to the check on the CPU and in float32, where flash attention has no kernel."""
    AttentionInterface.register("flash_of_a_test", flash_of_a_test)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY)).eval()
    expected = check_head(model)
    model.config._attn_implementation = "flash_of_a_test"
    with pytest.raises(RuntimeError, match="only support"):
        model(input_ids=torch.arange(5)[None])
    assert check_head(model) == expected
    assert model.config._attn_implementation == "flash_of_a_test"


@pytest.mark.parametrize("check", [check_head, packing_problem])
def test_a_full_memory_says_nothing_of_the_model(check, monkeypatch):
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY)).eval()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.get_decoder(), "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        check(model)


@pytest.mark.parametrize("skips", ["flash_attention_2", "kernels-community/flash-attn2", "varlen", None])
def test_attention_that_skips_work_between_documents(skips):
    """transformers takes kernels of the hub where flash_attn is not installed, under their own name."""
    assert is_skipping(skips, torch.device("cuda"))
    assert not is_skipping(skips, torch.device("cpu"))
    assert is_skipping(skips, torch.device("xpu")) == ("flash" in (skips or ""))


@pytest.mark.parametrize("name", ["flex_attention", "sdpa", "eager"])
def test_attention_that_does_not(name):
    assert not is_skipping(name, torch.device("cuda"))


def test_a_version_of_transformers_that_asks_otherwise_gets_no_new_names(monkeypatch):
    monkeypatch.delattr(masking_utils, "fast_all", raising=False)
    with known_rows(packed=True):
        assert not hasattr(masking_utils, "fast_all")
    assert not hasattr(masking_utils, "fast_all")
