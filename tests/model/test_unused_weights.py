"""Models with weights that text never goes through, here a vision tower: trained, continued, exported, adapted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from sftmix.model.adapters import add_adapters
from sftmix.model.export import export_model
from sftmix.model.layers import freeze_unused, unused_modules
from sftmix.model.load import load_model, stored_dtype
from sftmix.model.mapped import mapped_model
from sftmix.options import LoraOptions
from sftmix.tools.runs.adapters import load_adapters
from sftmix.training.checkpoint import full_weights
from tests.distributed.test_loading import sharded
from tests.forked import on_ranks
from tests.model.test_models import FAMILIES, TINY, build
from tests.tiny import cut_before_the_end, make_tiny, metrics, weights
from tests.trained import Trained, assert_exact

LORA = LoraOptions(r=2, bias="all")
ONE = ("--training.max_steps", "4", "--checkpoint.every", "2", "--objective", "NTP")


def write_model(directory, vocabulary, **ids):
    """Write a random Gemma 3 with a vision tower, in bfloat16, as the hub's are."""
    text = TINY | {"vocab_size": vocabulary + 3, "max_position_embeddings": 128, "sliding_window": 16}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text | ids,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=vocabulary,
        boi_token_index=vocabulary + 1,
        eoi_token_index=vocabulary + 2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def unseen(name):
    return "vision" in name or "multi_modal" in name


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    tiny = make_tiny(tmp_path_factory.mktemp("seeing"))
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (tiny.model / file).unlink()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    write_model(tiny.model, len(tokenizer), **ids)
    return tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_model_of_text_is_left_out(family):
    model = freeze_unused(build(family))
    assert all(p.requires_grad for p in model.parameters())
    assert unused_modules(model) == {}


@pytest.mark.slow
def test_what_text_never_goes_through_is_left_as_it_is_and_the_run_continues(seeing, sftmix, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["run", *seeing.options, *ONE]
    done = sftmix(*words, "--out", str(whole))
    assert done.code == 0, done.err
    cut_before_the_end(whole, cut)
    done = sftmix(*words, "--out", str(cut))
    assert done.code == 0, done.err
    assert "train: resuming after step 2 of 4" in done.out
    assert sftmix("export", str(cut), "--to", str(tmp_path / "again")).code == 0
    before, after, continued = load_file(seeing.model / "model.safetensors"), weights(whole), weights(cut)
    exported = load_file(tmp_path / "again" / "model.safetensors")
    assert {x.dtype for x in after.values()} == {torch.bfloat16}
    assert before.keys() == after.keys() == continued.keys() == exported.keys()
    for name, x in after.items():
        assert torch.equal(continued[name], x), name
        assert torch.equal(exported[name], x), name
        assert torch.equal(before[name], x) is unseen(name), name
    assert [m["loss"] for m in metrics(whole)] == [m["loss"] for m in metrics(cut)]


def test_the_stored_dtype_is_that_of_the_whole_model(seeing, tmp_path):
    """Files of the hub name it once, for the whole; what is written names it in each part."""
    hub = shutil.copytree(seeing.model, tmp_path / "hub")
    config = json.loads((hub / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    for part in ("text_config", "vision_config"):
        config[part].pop("dtype", None)
    (hub / "config.json").write_text(json.dumps(config))
    assert stored_dtype(hub) == torch.bfloat16
    assert mapped_model(hub) is not None
    tokenizer = AutoTokenizer.from_pretrained(hub)
    export_model(load_model(hub), tokenizer, tmp_path / "out", dtype=torch.float16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == written["vision_config"]["dtype"] == "float16"
    assert stored_dtype(tmp_path / "out") == torch.float16


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear"], ["q_proj", "k_proj"], r".*\.[qv]_proj"])
def test_adapters_are_put_where_text_goes(seeing, targets, tmp_path):
    model = load_model(seeing.model)
    add_adapters(model, LoraOptions(r=2, bias="all", target_modules=targets), seed=0)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(adapted) == 2 * (7 if "all-linear" in targets else 2)
    assert all(name.startswith("model.language_model.layers.") for name in adapted + trained)
    tokenizer = AutoTokenizer.from_pretrained(seeing.model)
    path = export_model(model, tokenizer, tmp_path / "adapters", dtype=torch.float32, base=str(seeing.model))
    again = load_model(seeing.model)
    load_adapters(again, path)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == trained


# ------------------------------------------------------------------------------------------------- several ranks


def ranks_train(world, path):
    """DDP would wait for gradients that do not come; FSDP gathers what is exported from frozen shards, too."""
    before = load_model(path).state_dict()
    for parallel in ("ddp", "fsdp"):
        state = full_weights(Trained(load_model(path), steps=2, world=world, parallel=parallel).wrapped)
        if world.is_main:
            assert state.keys() == before.keys()
            for name, x in before.items():
                assert torch.equal(state[name], x) is unseen(name), name
    state = full_weights(sharded(world, Path(path), LoraOptions(), "fsdp"))
    if world.is_main:
        assert_exact(state, before)
    adapted = sharded(world, Path(path), LORA, "fsdp")
    assert all("language_model.layers" in n for n, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.slow
def test_two_ranks_train_what_text_goes_through(tmp_path):
    write_model(tmp_path / "model", 61)
    on_ranks(ranks_train, str(tmp_path / "model"))
