"""The files of an export, written layer by layer, are those of `save_pretrained`, byte for byte."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from sftmix.model import shards
from sftmix.model.shards import write_shards
from tests.model.test_adapters_of_experts import model_of
from tests.model.test_models import TINY, build, random_model

HALF = torch.bfloat16
JOINED = {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1}


def joined():
    """Two weights of a layer are one in the file."""
    return random_model(CONFIG_MAPPING["hrm_text"](**TINY | JOINED))


MODELS = {
    "tied": lambda: build("llama tied"),
    "gpt2": lambda: build("gpt2"),
    "experts": lambda: model_of("qwen3_moe"),
    "renamed": lambda: model_of("mixtral"),
    "renamed in more ways": lambda: model_of("laguna"),
    "joined": joined,
}


def files(directory):
    found = {file.name: file.read_bytes() for file in directory.iterdir() if file.name.startswith("model")}
    assert found
    return found


@pytest.mark.parametrize("size", [10_000, 50 * 10**9])
@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_transformers(name, size, tmp_path, monkeypatch):
    """Also in many files, and of a model that was loaded, which knows how its names were changed."""
    monkeypatch.setattr(shards, "SHARD", size)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "base")
    for number, one in enumerate((model, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))):
        copy.deepcopy(one).to(HALF).save_pretrained(tmp_path / f"theirs {number}", max_shard_size=size)
        (tmp_path / f"ours {number}").mkdir()
        write_shards(one, tmp_path / f"ours {number}", one.state_dict().items(), HALF)
        expected, found = files(tmp_path / f"theirs {number}"), files(tmp_path / f"ours {number}")
        assert expected.keys() == found.keys()
        assert len(found) > 2 or size > 10_000
        assert expected == found


def test_weights_that_make_other_files_one_by_one_are_reverted_together(tmp_path, monkeypatch):
    """As a layer is cut here, into single weights, a step over layers would be by layers."""
    model = joined()
    write_shards(model, tmp_path, model.state_dict().items(), HALF)
    expected = files(tmp_path)
    assert b"gate_up" in expected["model.safetensors"]
    monkeypatch.setattr(shards, "_layer", str)
    write_shards(model, tmp_path, model.state_dict().items(), HALF)
    assert files(tmp_path) == expected


def test_a_weight_without_a_value_is_no_zeros_in_a_file(tmp_path):
    with pytest.raises(RuntimeError, match="no value came for lm_head"):
        write_shards(build("llama"), tmp_path, list(build("llama").state_dict().items())[:-1], HALF)
