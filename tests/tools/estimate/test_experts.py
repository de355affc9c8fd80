"""Experts to which tokens are routed are refused before anything is counted, and dense layers of their families not."""

import pytest
import transformers
from transformers import AutoTokenizer

from sftmix.words.errors import ConfigError
from tests.tools.estimate.configs import VOCABULARY, WIDTH
from tests.tools.estimate.test_memory import SLOTS, estimated

SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 128}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SPARSE = {
    "Mixtral": FEW | {"num_local_experts": 4},
    "Qwen2Moe": FEW | {"num_experts": 4},
    "Qwen3Moe": FEW | {"num_experts": 4},
    "Olmoe": FEW | {"num_experts": 4},
    "GptOss": FEW | {"num_local_experts": 4},
    "DeepseekV3": FEW | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "Phimoe": FEW | {"num_local_experts": 4},
    "JetMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
}
DENSE = {
    "Qwen3": {},
    "Qwen3Moe": {"mlp_only_layers": [0, 1]},
    "DeepseekV3": {"first_k_dense_replace": 2, "num_key_value_heads": 4, "qk_rope_head_dim": 8},
}


def write(directory, family, vocabulary=VOCABULARY, **options):
    made = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, **SIZES | options)
    made.architectures = [f"{family}ForCausalLM"]
    made.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("read_only", [True, False])
def test_experts_of_every_family_are_refused(family, read_only, tmp_path):
    """Also in a stage without training, which has no micro-batch, and on several GPUs, where torch follows some."""
    path = write(tmp_path, family, **SPARSE[family])
    with pytest.raises(ConfigError, match=rf"experts \({family}\w*Experts\).* all of them.* --training\.max_steps 2"):
        estimated(path, None if read_only else SLOTS)


@pytest.mark.parametrize("family", DENSE)
def test_dense_layers_of_their_families_are_counted(family, tmp_path):
    path = write(tmp_path, family, **DENSE[family])
    assert estimated(path, None)["weights"] > 0
    assert estimated(path, SLOTS, count=1)["activations"] > 0


@pytest.mark.parametrize("gpus", ["1", "8"])
def test_the_command_says_it_in_one_line(gpus, tiny, sftmix):
    write(tiny.model, "Mixtral", len(AutoTokenizer.from_pretrained(tiny.model)), **SPARSE["Mixtral"])
    done = sftmix("estimate", *tiny.options, "--gpu", "H100", "--gpus", gpus)
    assert done.code == 2, done.err
    assert "routes tokens to experts (MixtralExperts)" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
