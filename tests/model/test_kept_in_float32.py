"""What transformers keeps in float32 beside bfloat16 is delivered with the bits it came with."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from sftmix import RunConfig
from sftmix.model.export import export_model
from sftmix.model.load import load_model, load_tokenizer
from sftmix.model.mapped import mapped_model
from sftmix.model.rounding import refuse_overflow
from sftmix.options import CheckpointOptions
from sftmix.pipeline.loaded import round_weights
from sftmix.training.module import TrainingModule

BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
EXPERTS = {"n_routed_experts": 32, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 0}
HEADS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture
def tokenizer(small):
    return load_tokenizer(small.model)


@pytest.fixture
def path(tokenizer, tmp_path):
    """A base model in bfloat16 whose biases, as large as published ones, differ by less than bfloat16 can tell."""
    config = DeepseekV3Config(
        vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=2, **SIZES, **EXPERTS, **HEADS
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    model.get_submodule(BIAS.rpartition(".")[0]).e_score_correction_bias = 14.5 + 0.03 * torch.randn(32)
    model.save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors")[BIAS].unique().numel() == 32
    return tmp_path / "base"


def test_ranks_map_them_beside_values_in_bfloat16(path):
    """No rank loads the whole model in float32 for their sake."""
    mapped, plain = mapped_model(path), load_model(path)
    assert mapped is not None
    assert {p.dtype for p in mapped.parameters()} == {torch.bfloat16}
    found = mapped.state_dict()
    assert found[BIAS].dtype == torch.float32
    assert found.keys() == plain.state_dict().keys()
    assert all(torch.equal(found[name].float(), x) for name, x in plain.state_dict().items())


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_biases_that_choose_experts_stay(path, tokenizer, tmp_path, rounding):
    model = load_model(path)
    with torch.no_grad():
        model.lm_head.weight += 1e-4
    refuse_overflow(model, torch.bfloat16)
    round_weights(RunConfig(checkpoint=CheckpointOptions(rounding=rounding)), TrainingModule(model), torch.bfloat16)
    export_model(model, tokenizer, tmp_path / "out", dtype=torch.bfloat16)
    before, after = (load_file(one / "model.safetensors") for one in (path, tmp_path / "out"))
    assert {name: x.dtype for name, x in after.items()} == {name: x.dtype for name, x in before.items()}
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]
    ids = torch.arange(64).view(4, 16)
    delivered = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(delivered(ids).logits, model(ids).logits, rtol=0, atol=0)
