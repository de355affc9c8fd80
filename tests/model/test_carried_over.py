"""What a base model has beside its text weights goes along, or is named."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sftmix.model.export import export_model
from sftmix.model.load import load_model, load_tokenizer
from sftmix.options import DataOptions
from sftmix.text.encoder import encoder_for
from tests.model.test_models import TINY, random_model
from tests.tiny import SHORT


def test_weights_that_transformers_passes_over_are_named(tmp_path, capsys):
    """Of multi-token prediction; one family counts them as layers of its decoder."""
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    config = transformers.DeepseekV3Config(**TINY, **latent, **experts, moe_intermediate_size=16)
    model = random_model(config)
    assert any("61" in rule for rule in model._keys_to_ignore_on_load_unexpected)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {f"model.layers.61.{name}": torch.ones(2) for name in ("eh_proj.weight", "rotary_emb.inv_freq")}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    load_model(tmp_path)
    assert "left out 1 weights (model.layers.61.eh_proj.weight, ...)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_models_own_layers_are_not_named_as_left_out(tmp_path, capsys):
    """Rules of this family name the layer of multi-token prediction of two models by its number."""
    sizes = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    for layers, left in ((48, False), (2, True)):
        config = transformers.Glm4MoeConfig(**TINY | {"num_hidden_layers": layers}, **sizes, n_group=1, topk_group=1)
        model = random_model(config)
        assert any("46" in rule for rule in model._keys_to_ignore_on_load_unexpected)
        model.save_pretrained(tmp_path / str(layers))
        file = tmp_path / str(layers) / "model.safetensors"
        more = {"model.layers.92.eh_proj.weight": torch.ones(2)} if left else {}
        save_file(load_file(file) | more, file, metadata={"format": "pt"})
        load_model(tmp_path / str(layers))
        told = capsys.readouterr().err
        assert ("left out 1 weights (model.layers.92.eh_proj.weight" in told) is ("left out" in told) is left


def test_a_config_names_no_code_that_is_not_there(small, tmp_path):
    random_model(transformers.LlamaConfig(**TINY)).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    code = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    base, tokenizer = load_model(tmp_path / "base"), load_tokenizer(small.model)
    out = export_model(base, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert load_model(tmp_path / "base").config.auto_map == code


def test_named_templates_stay_beside_the_default_one(small, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    plain = tokenizer.chat_template
    tokenizer.chat_template = named = {"default": plain, "rag": plain + "{# rag #}"}
    model, encoder = random_model(transformers.LlamaConfig(**TINY)), encoder_for(tokenizer, DataOptions())
    for trained, kept in ((encoder.chat_template, named), (None, named), ("{{ messages }}", "{{ messages }}")):
        out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32, chat_template=trained)
        assert AutoTokenizer.from_pretrained(out).chat_template == kept


def test_files_of_an_image_processor_go_along(tiny, tmp_path, sftmix):
    content = '{"image_processor_type": "Gemma3ImageProcessor"}'
    (tiny.model / "preprocessor_config.json").write_text(content)
    assert sftmix("run", *tiny.options, *SHORT, "--out", str(tmp_path / "run")).code == 0
    assert (tmp_path / "run" / "train" / "model" / "preprocessor_config.json").read_text() == content
