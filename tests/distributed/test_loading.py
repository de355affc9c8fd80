"""Ranks that share the weights start from exactly those of a plain load: each maps the files, or rank 0 sends them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RwkvConfig,
)

from sftmix.config import RunConfig
from sftmix.model.head import check_head
from sftmix.model.load import load_model
from sftmix.model.mapped import empty_model, mapped_model
from sftmix.model.meta import take_values
from sftmix.options import LoraOptions, ModelOptions, TrainingOptions
from sftmix.pipeline.loaded import load_for_run
from sftmix.ranks.world import World
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import unwrap, wrap
from sftmix.words.errors import ConfigError
from tests.forked import on_ranks

LLAMA: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
LORA = LoraOptions(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"], use_dora=False)


REFUSED = {
    "seeing": "sees later tokens",
    "nan": r"not finite numbers, .* 1 weights \(model\.layers\.1\.mlp\.up_proj",
    "halved": "changes its own weights",
}
"""Models that their first pass refuses, once every rank has its part of the values."""


def save_models(root: Path) -> list[str]:
    """Directories of tiny models: tied and not, two dtypes, in several files, with names of the backbone alone."""

    def save(name: str, model, *, dtype=torch.float32, **options) -> None:
        model.to(dtype).save_pretrained(root / name, **options)

    torch.manual_seed(0)
    save("untied", LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)))
    save("tied", LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)))
    save("headed", LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)))
    file = root / "headed" / "config.json"  # which says tied, of a head that the files have apart
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    half = LlamaConfig(**LLAMA, rope_parameters=llama3)
    save("half", LlamaForCausalLM(half), dtype=torch.bfloat16, max_shard_size=4_000)
    assert len(list((root / "half").glob("*.safetensors"))) > 1
    granite = GraniteConfig(**LLAMA, logits_scaling=8.0, embedding_multiplier=3.0)  # a scale with two readings
    save("scaled", AutoModelForCausalLM.from_config(granite), dtype=torch.bfloat16)
    gemma = Gemma2Config(**LLAMA, head_dim=4, final_logit_softcapping=5.0, layer_types=["full_attention"] * 2)
    save("capped", AutoModelForCausalLM.from_config(gemma), dtype=torch.bfloat16)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    gpt2.save_pretrained(root / "backbone")
    file = root / "backbone" / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    mixed = root / "mixed"
    save("mixed", LlamaForCausalLM(LlamaConfig(**LLAMA)), dtype=torch.bfloat16)
    values = load_file(mixed / "model.safetensors")
    values["model.norm.weight"] = torch.linspace(0.5, 1.5, 16)  # float32: in the dtype of the config it is rounded
    save_file(values, mixed / "model.safetensors", metadata={"format": "pt"})
    return sorted(p.name for p in root.iterdir() if p.is_dir())


def sharded(world: World, path: Path, lora: LoraOptions, parallel: str) -> TrainingModule:
    """The module that a run trains, as the run makes it."""
    options = TrainingOptions(parallel=parallel, shard_group_size=2 if parallel == "hsdp" else None)
    config = RunConfig(model=ModelOptions(path=str(path), lora=lora), training=options, seed=3)
    model = load_for_run(config, world)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    size = options.shard_group_size
    module = TrainingModule(model)
    wrapped = wrap(module, parallel=parallel, precision="fp32", world=world, shard_group_size=size)
    assert not hasattr(model, "values_to_come"), "they are released"
    assert isinstance(wrapped, TrainingModule)
    return wrapped


def plain(path: Path, lora: LoraOptions):
    model = load_model(path)
    if lora.r:
        config = RunConfig(model=ModelOptions(path=str(path), lora=lora), seed=3)
        model = load_for_run(config, World())
    return model


def compare(module: TrainingModule, path: Path, lora: LoraOptions) -> None:
    expected, found = plain(path, lora), module.model
    head = check_head(expected)
    assert (module.head.scale, module.head.softcap) == (head.scale, head.softcap)
    parameters = dict(found.named_parameters())
    assert list(parameters) == [name for name, _ in expected.named_parameters()]  # tied ones are one in both
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameters[name].full_tensor(), parameter), f"{path.name} {name}"
        assert parameters[name].dtype == torch.float32
        assert parameters[name].requires_grad == parameter.requires_grad
        local = parameters[name].to_local()
        assert local.numel() < parameter.numel() or parameter.shape[0] == 1, "a shard is a part"
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), f"{path.name} {name}"
        assert buffers[name].dtype == buffer.dtype
    if torch.distributed.get_rank() == 0 or not lora.use_dora:
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert found.config.dtype == expected.config.dtype


def ranks_start_from_the_same(world: World, root: str, parallel: str) -> None:
    for path in sorted(p for p in Path(root).iterdir() if p.is_dir() and p.name not in ("broken", *REFUSED)):
        compare(sharded(world, path, LoraOptions(), parallel), path, LoraOptions())
    for name in ("tied", "half", "headed"):
        path = Path(root) / name
        compare(sharded(world, path, LORA, parallel), path, LORA)
        dora = LoraOptions(r=2, use_dora=True, init_lora_weights="orthogonal")
        compare(sharded(world, path, dora, parallel), path, dora)
    for name, words in REFUSED.items():
        with pytest.raises(ConfigError, match=words):
            sharded(world, Path(root) / name, LoraOptions(), parallel)
    with pytest.raises(ConfigError, match=r"no values for 1 weights of the model \(model\.norm\.weight"):
        sharded(world, Path(root) / "broken", LoraOptions(), parallel)


def ranks_take_whole_values(world: World, root: str) -> None:
    """A model that was loaded to be shared, and is planned for ddp."""
    for name, lora in (("tied", LoraOptions()), ("half", LORA), ("scaled", LoraOptions()), ("mixed", LoraOptions())):
        path = Path(root) / name
        options = TrainingOptions(parallel="fsdp")
        config = RunConfig(model=ModelOptions(path=str(path), lora=lora), training=options, seed=3)
        model = load_for_run(config, world)
        module = unwrap(wrap(TrainingModule(model), parallel="ddp", precision="fp32", world=world))
        expected = plain(path, lora)
        head = check_head(expected)
        assert (module.head.scale, module.head.softcap) == (head.scale, head.softcap)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        assert list(parameters) == [name for name, _ in expected.named_parameters()]
        for name, parameter in expected.named_parameters():
            assert torch.equal(parameters[name], parameter), f"{path.name} {name}"
            assert parameters[name].requires_grad == parameter.requires_grad
        for name, buffer in expected.named_buffers():
            assert torch.equal(buffers[name], buffer), f"{path.name} {name}"


@pytest.mark.slow
def test_ranks_that_do_not_share_weights_take_them_whole(models):
    on_ranks(ranks_take_whole_values, str(models))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    assert len(save_models(root)) == 8
    LlamaForCausalLM(LlamaConfig(**LLAMA, is_causal=False)).save_pretrained(root / "seeing")
    broken = LlamaForCausalLM(LlamaConfig(**LLAMA))
    broken.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    broken.save_pretrained(root / "nan")
    rwkv = RwkvConfig(vocab_size=61, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, rescale_every=1)
    AutoModelForCausalLM.from_config(rwkv).save_pretrained(root / "halved")
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(root / "broken")
    file = root / "broken" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file, metadata={"format": "pt"})
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "ranks"), [("fsdp", 2), pytest.param("hsdp", 4, marks=pytest.mark.long)])
def test_ranks_start_from_the_weights_of_a_plain_load(models, parallel, ranks):
    on_ranks(ranks_start_from_the_same, str(models), parallel, ranks=ranks)


def test_what_is_exported_is_what_was_loaded(models, tmp_path):
    """`mapped_model` keeps what saving needs beside the values, which keep the dtype of the files if all have one."""
    for name, dtype in (("tied", torch.float32), ("backbone", torch.float32), ("half", torch.bfloat16)):
        model = mapped_model(models / name)
        assert model is not None
        values = take_values(model)
        assert {value.dtype for value in values.values()} == {dtype}
        model.save_pretrained(tmp_path / name, state_dict=values)
        again, first = load_model(tmp_path / name).state_dict(), load_model(models / name).state_dict()
        assert again.keys() == first.keys()
        assert all(torch.equal(again[k], first[k]) for k in first)
    assert mapped_model(models / "mixed") is None


def test_a_model_without_values_is_tied_where_the_model_is(models):
    for name, tied in (("tied", True), ("untied", False)):
        model = empty_model(models / name)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
        assert {b.device.type for b in model.buffers()} == {"cpu"}
        assert not model.training
