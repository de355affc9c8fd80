"""Which weights decay: as in a Trainer of transformers, whatever the number of their dimensions."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from sftmix.components.optimizers import decay_groups

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "Llama": {},
    "GptOss": {"head_dim": 8, "num_local_experts": 4},  # biases of experts
    "Cohere": {"use_qk_norm": True},  # norms of heads
    "Qwen3Moe": {"head_dim": 8},
    "Mamba": {},
    "GPT2": {},
}
OF_A_TRAINER = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_decay_that_are_no_bias_and_no_norm(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**SMALL | FAMILIES[family]))
    parameters = dict(model.named_parameters())
    decayed, others = decay_groups(parameters, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {names[id(parameter)] for parameter in decayed["params"]}
    theirs = {*get_parameter_names(model, [torch.nn.LayerNorm], OF_A_TRAINER)} & parameters.keys()
    # Mamba's own authors mark A_log and D, which transformers' list does not know.
    assert found == {name for name in theirs if parameters[name].ndim > 1 and not name.endswith(".A_log")}
    assert len(found) + len(others["params"]) == len(parameters)
