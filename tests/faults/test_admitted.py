"""Transformers sees the admitted files of a model and no others, whatever its files name; the loaded model is asked."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, DogeConfig

from sftmix.disk.files import read_json, write_json
from sftmix.model.admitted import FILES, TEMPLATES, admit, find_model
from sftmix.model.load import fingerprint, load_model, load_tokenizer, model_config
from sftmix.model.paths import ADAPTERS
from sftmix.words.errors import ConfigError
from tests.faults.runs import change
from tests.model.test_models import GPT2, TINY, random_model

OTHERS = {
    "pytorch_model.bin": "a pickle",
    "config.4.0.0.json": "another version",
    "tokenizer.4.0.0.json": "another version",
    "adapter_config.json": "adapters",
    "modeling_x.py": "code",
    "shards/model.safetensors.index.json": "an index in a folder",
    ".metadata": "a pickle of torch's checkpoints",
    "x.safetensors.index.json": "an index of another name",
}


def test_nothing_else_is_in_the_directory(tiny):
    for name, text in OTHERS.items():
        file = tiny.model / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (tiny.model / TEMPLATES).mkdir()
    (tiny.model / TEMPLATES / "tool_use.jinja").write_text("{{ messages }}")
    private = admit(find_model(tiny.model))
    seen = {file.relative_to(private).as_posix() for file in private.rglob("*") if file.is_file()}
    assert seen == {*os.listdir(tiny.model), f"{TEMPLATES}/tool_use.jinja"} & {*FILES, f"{TEMPLATES}/tool_use.jinja"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= seen
    assert (private.stat().st_mode & 0o077) == 0  # of nobody else


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "merges.txt", "model.safetensors"])
def test_a_pipe_is_no_file(name, tiny):
    """Whoever reads it would wait for ever."""
    (tiny.model / name).unlink(missing_ok=True)
    os.mkfifo(tiny.model / name)
    if name == "merges.txt":  # nothing needs it
        assert load_tokenizer(tiny.model)("a").input_ids
    else:
        with pytest.raises(ConfigError, match=r"model\.path"):
            load_tokenizer(tiny.model) if name == "tokenizer.json" else load_model(tiny.model)


HOSTILE = {
    "versions of the configuration": ({"configuration_files": ["config.4.0.0.json"]}, "cannot load"),
    "another name for the name of the weights": (
        {"attribute_map": {"transformers_weights": "w"}, "w": "pytorch_model.bin"},
        "names pytorch_model.bin as a file of its weights",
    ),
    "weights that are a list": ({"transformers_weights": ["a"]}, "as a file of its weights"),
    "quantised by a stranger": ({"quantization_config": {"quant_method": "x"}}, "quantised by 'x', which is not read"),
    "quantised by nobody": ({"quantization_config": {"load": 1}}, "quantised by None, which is not read"),
    "quantised by a word": ({"quantization_config": "x"}, "cannot load"),
    "no type": ({"model_type": None}, "names no model_type"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_configuration_names_is_refused(kind, tiny):
    values, reason = HOSTILE[kind]
    (tiny.model / "config.4.0.0.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tiny.model / "pytorch_model.bin").write_bytes(b"x")
    change(tiny.model / "config.json", **values)
    with pytest.raises(ConfigError, match=reason) as error:
        load_model(tiny.model)
    assert "sftmix-model-" not in str(error.value)


@pytest.mark.parametrize("ends", [{"a": 1}, [[1]], "x", 10**40, True, [1, "x"]])
def test_the_end_of_an_answer_is_an_id(ends, tiny):
    change(tiny.model / "generation_config.json", eos_token_id=ends)
    with pytest.raises(ConfigError, match=r"eos_token_id: .* in its .*; allowed: the id of a token, or a list of ids"):
        load_model(tiny.model)


def test_a_special_token_is_a_text(tiny):
    write_json(tiny.model / "special_tokens_map.json", {"bos_token": {"a": 1}})
    with pytest.raises(ConfigError, match="cannot load"):
        load_tokenizer(tiny.model)


def test_a_panic_of_tokenizers_is_one_line(tiny):
    """Of Rust, and no Exception."""
    content = read_json(tiny.model / "tokenizer.json")
    content["model"]["continuing_subword_prefix"] = "a" * 5000
    write_json(tiny.model / "tokenizer.json", content)
    with pytest.raises(ConfigError, match=r"cannot load .*out of range"):
        load_tokenizer(tiny.model)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2"])
def test_attention_is_never_that_of_the_file(key, value, tiny):
    before = load_model(tiny.model).config._experts_implementation
    change(tiny.model / "config.json", **{key: value, "_experts_implementation": "deepgemm"})
    for attention in (None, "eager"):
        model = load_model(tiny.model, attention=attention)
        assert model.config._attn_implementation == (attention or "sdpa")
        assert model.config._experts_implementation == before


def test_another_tokenizer_file_is_not_read(tiny):
    (tiny.model / "tokenizer.4.0.0.json").write_text("{}")
    change(tiny.model / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    with pytest.raises(ConfigError, match="cannot load"):
        load_tokenizer(tiny.model)


def test_every_vocabulary_of_transformers_is_admitted():
    """By the sources of transformers: some classes need packages that are not here."""
    named = set()
    for file in Path(transformers.__file__).parent.rglob("tokenization*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [getattr(target, "id", "").lower() for target in getattr(node, "targets", ())]
            if "vocab_files_names" in names and isinstance(node.value, ast.Dict):
                named |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    # of models that write no text: translation, speech, search, Japanese readings
    others = {
        *("entity_vocab.json", "prophetnet.tokenizer", "normalizer.json", "spm_char.model", "vocab-src.json"),
        *("vocab-tgt.json", "source.spm", "target.spm", "target_vocab.json", "byte_maps.json", "word_shape.json"),
        "word_pronunciation.json",
    }
    assert len(named) > 15
    assert named - others <= set(FILES)


def test_links_to_blobs_are_followed(tiny, tmp_path):
    """A snapshot of the hub's cache holds links."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(tiny.model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert load_model(snapshot).num_parameters() > 0
    assert load_tokenizer(snapshot)("a").input_ids


def test_adapters_of_the_hub_are_no_model(tiny, tmp_path, monkeypatch):
    """They may have a tokenizer beside them."""
    repository = tmp_path / "models--some--adapters"
    shutil.copytree(tiny.model, repository / "snapshots" / "a")
    (repository / "snapshots" / "a" / ADAPTERS).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for load in (load_model, model_config):
        with pytest.raises(ConfigError, match="some/adapters holds adapters, not a model"):
            load("some/adapters")
    assert load_tokenizer("some/adapters")("a").input_ids


def test_names_are_those_that_were_asked_for(tiny, tmp_path):
    model, tokenizer = load_model(tiny.model), load_tokenizer(tiny.model)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert {model.name_or_path, model.config.name_or_path, tokenizer.name_or_path} == {str(tiny.model)}
    for file in (tmp_path / "saved").glob("*.json"):
        assert "sftmix-model-" not in file.read_text()


def test_templates_in_a_folder_are_in_the_identity(tiny):
    before = fingerprint(str(tiny.model))
    (tiny.model / TEMPLATES).mkdir()
    (tiny.model / TEMPLATES / "tool_use.jinja").write_text("{{ messages }}")
    assert fingerprint(str(tiny.model)) != before


ROPE = {
    "flat": {"rope_theta": 5e5, "rope_scaling": None},
    "scaled": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "an old word": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
}


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_configurations_of_transformers_4(kind, family, tmp_path):
    """Their rope is at the top; Gemma 3 has one for each kind of layer."""
    config = getattr(transformers, f"{family}Config")(**TINY)
    model = random_model(config)
    model.save_pretrained(tmp_path)
    stored = read_json(tmp_path / "config.json")
    stored.pop("rope_parameters", None)
    write_json(tmp_path / "config.json", {**stored, **ROPE[kind], "transformers_version": "4.57.0"})
    same_as_plain(tmp_path)


FAMILIES = """llama mistral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 gpt_neox gpt2 olmo2 glm glm4 granite
mixtral stablelm starcoder2 smollm3 cohere olmoe helium exaone4 ernie4_5 hunyuan_v1_dense"""


@pytest.mark.parametrize("family", FAMILIES.split())
def test_families_load_as_plain_transformers_loads_them(family, tmp_path):
    kind = type(transformers.AutoConfig.for_model(family))
    more = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    values = GPT2 if family == "gpt2" else {**TINY, **(more if "mo" in family or family == "mixtral" else {})}
    random_model(kind(**values)).save_pretrained(tmp_path)
    same_as_plain(tmp_path)


def same_as_plain(directory: Path) -> None:
    ours, theirs = load_model(directory), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.arange(12).view(2, 6) % 7 + 3
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)
    assert type(ours) is type(theirs)


def test_a_tokenizer_is_that_of_plain_transformers(tiny):
    ours, theirs = load_tokenizer(tiny.model), AutoTokenizer.from_pretrained(tiny.model)
    assert ours("a few words, 12").input_ids == theirs("a few words, 12").input_ids
    assert ours.init_kwargs == theirs.init_kwargs


@pytest.mark.parametrize("number", [20_001, 10**12, 10**400], ids=["20001", "1e12", "1e400"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "n_routed_experts", "vision_config.depth"])
def test_numbers_of_layers_that_nobody_builds_are_refused(name, number, tiny):
    """Building them takes hours, or all memory; so may the configuration's own list with a kind for each layer."""
    *parts, last = name.split(".")
    config = read_json(tiny.model / "config.json")
    (config.setdefault(parts[0], {}) if parts else config)[last] = number
    (tiny.model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"config.json of .* has '{last}'.*at most 20,000"):
        load_model(tiny.model)


def test_as_many_experts_as_a_known_family_has_are_admitted(tiny):
    """Doge's configuration has them in its dense models as well."""
    number = DogeConfig().num_experts
    write_json(tiny.model / "config.json", read_json(tiny.model / "config.json") | {"num_experts": number})
    assert load_model(tiny.model).config.num_hidden_layers == 2
