"""What others read from an export: by AutoModelForCausalLM, by AutoTokenizer, by transformers 4."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from sftmix.model import export
from sftmix.model.adapters import add_adapters
from sftmix.model.compared import say_once
from sftmix.model.export import export_model
from sftmix.model.load import load_model, load_tokenizer
from sftmix.model.probes import TEXTS, adapters_left_out
from sftmix.options import LoraOptions
from tests.model.test_models import TINY, random_model, tokenizer

__all__ = ["tokenizer"]  # the fixture

GATED = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
GATED |= {"layer_types": ["linear_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def said_anew():
    say_once.cache_clear()


@pytest.fixture
def composite(tmp_path, tokenizer):
    """A Qwen 3.5 with a vision tower, whose text part is a model of another class with other names."""
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config(text_config=TINY | GATED, vision_config=VISION | {"patch_size": 4})
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    return tmp_path / "base"


def test_adapters_of_a_text_part_with_other_names_get_a_line(composite):
    model = load_model(composite)
    add_adapters(model, LoraOptions(r=2), seed=0)
    told = "".join(adapters_left_out(model, str(composite)))
    for reader in ("transformers", "PEFT"):
        line = f"adapters of Qwen3_5ForCausalLM, and {reader} on Qwen3_5ForConditionalGeneration cannot read them: Tar"
        assert line in told
    assert told.endswith("export with --merge for it")
    assert "on Qwen3_5ForCausalLM" not in told


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("config", "named", "lora", "said"),
    [
        (transformers.LlamaConfig(**TINY), "LlamaForSequenceClassification", {}, ""),
        (transformers.MixtralConfig(**TINY, **EXPERTS), "MixtralForSequenceClassification", {}, ""),
        (transformers.LlamaConfig(**TINY), "GPT2LMHeadModel", {}, "cannot read them: "),
        (
            transformers.LlamaConfig(**TINY),
            "LlamaForSequenceClassification",
            {"modules_to_save": ["lm_head"]},
            "leaves out 1 weights (lm_head.weight, ...) of them",
        ),
    ],
)
def test_a_line_names_what_another_class_does_not_have(config, named, lora, said, tmp_path):
    """As where config.json names the class of a classifier, whose decoder is the same."""
    made = random_model(config)
    made.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(file.read_text().replace(type(made).__name__, named))
    model = load_model(tmp_path / "base")
    add_adapters(model, LoraOptions(r=2, **lora), seed=0)
    told = "".join(adapters_left_out(model, str(tmp_path / "base")))
    assert said in told
    assert bool(said) == bool(told)


def test_a_text_part_is_exported_as_a_model_of_text(composite, tokenizer, tmp_path, capsys):
    model = load_model(composite)
    assert "left out" in capsys.readouterr().err
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32, base=str(composite))
    assert not (out / "preprocessor_config.json").exists()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("adapters", [False, True])
def test_a_plain_model_gets_no_line(tokenizer, tmp_path, capsys, adapters):
    model = random_model(
        transformers.Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    )
    model.save_pretrained(tmp_path / "base")
    if adapters:
        add_adapters(model, LoraOptions(r=2), seed=0)
    capsys.readouterr()
    export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32, base=str(tmp_path / "base"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: state | {"model.norm.weight": state["model.norm.weight"] + 0.1}, "by up to "),
        (lambda state: {name: x for name, x in state.items() if "up_proj" not in name}, "mlp.up_proj.weight"),
    ],
    ids=["another value", "a weight less"],
)
@pytest.mark.parametrize("fits", [True, False])
def test_an_export_that_is_another_model_gets_a_line(tokenizer, tmp_path, capsys, monkeypatch, damage, told, fits):
    """As a conversion of names and tensors that is no inverse would make it; without room, names alone are seen."""
    write = export.write_shards

    def damaged(model, path, *rest):
        write(model, path, *rest)
        file = path / "model.safetensors"
        save_file(damage(load_file(file)), file, metadata={"format": "pt"})

    monkeypatch.setattr(export, "write_shards", damaged)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 10**9 * fits}))
    model = random_model(transformers.LlamaConfig(**TINY))
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    line = f"{out}: AutoModelForCausalLM reads another model from it: "
    found = capsys.readouterr().err
    assert (line in found and told in found) is (fits or "proj" in told)


@pytest.fixture
def by_file(tmp_path):
    """Function: a tokenizer of bytes, read from a file without Qwen's rules, for a model of some type."""

    def read(family):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(BPE({word: place for place, word in enumerate([*letters, "12", "<end>"])}, [("1", "2")]))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        place = tmp_path / family
        AutoConfig.for_model(family).save_pretrained(place)
        backend.save(str(place / "tokenizer.json"))
        (place / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<end>"}')
        return load_tokenizer(place)

    return read


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_autotokenizer_makes_the_tokens_of_the_run_or_a_line_says_so(by_file, tmp_path, capsys, family):
    tokenizer = by_file(family)
    model = random_model(
        getattr(transformers, {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}.get(family, "LlamaConfig"))(**TINY)
    )
    capsys.readouterr()
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    named, plain = AutoTokenizer.from_pretrained(out), PreTrainedTokenizerFast.from_pretrained(out)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert all(plain(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
    same = all(named(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
    assert same is (family != "qwen2")  # a type for which transformers 5.23 takes its own class, whatever the file says
    assert ("AutoTokenizer takes Qwen2Tokenizer for this type" in capsys.readouterr().err) is not same


@pytest.mark.parametrize("blank", [True, False])
def test_transformers_4_puts_a_blank_in_front_of_a_text_as_the_file_does(by_file, tmp_path, blank):
    """If tokenizer_config.json says nothing, it puts none."""
    model, tokenizer = random_model(transformers.LlamaConfig(**TINY)), by_file("llama")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert json.loads((out / "tokenizer_config.json").read_text()).get("add_prefix_space", False) is blank
    assert AutoTokenizer.from_pretrained(out)(TEXTS[1])["input_ids"] == tokenizer(TEXTS[1])["input_ids"]


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, LLAMA3], ids=["default", "llama3"])
def test_transformers_4_finds_the_base_of_rope(tokenizer, tmp_path, capsys, rope):
    """Its names are those of the published files of that time."""
    model = random_model(transformers.LlamaConfig(**TINY, rope_parameters=rope))
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    written = json.loads((out / "config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"]
    assert written["partial_rotary_factor"] == 1.0
    scaling = written["rope_scaling"] or {"rope_type": "default", "rope_theta": 1e6}
    assert {name: scaling[name] for name in rope} == rope
    ids = torch.arange(48).view(1, -1)
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids).logits, model(ids).logits)
    assert not capsys.readouterr().err


LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 3e3}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
TWO_BASES = LAYERS | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}
ONE_BASE = LAYERS | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL | {"rope_theta": 1e6}}}
HALF = {"rope_parameters": LOCAL | {"partial_rotary_factor": 0.5}}
OF_4 = {
    "gemma3_text": (TWO_BASES, {"rope_theta": 1e6, "rope_local_base_freq": 3e3}, LINEAR),
    "olmo3": (ONE_BASE, {"rope_theta": 1e6}, LINEAR),
    "gpt_neox": (HALF, {"rotary_emb_base": 3e3, "rotary_pct": 0.5}, None),
}
"""Options, what the configuration classes of transformers 4.57.1 read of them, and their rope_scaling."""


@pytest.mark.parametrize("family", OF_4)
def test_transformers_4_finds_rope_under_the_names_of_the_type(tokenizer, tmp_path, capsys, family):
    options, names, scaling = OF_4[family]
    model = random_model(AutoConfig.for_model(family, **TINY | options))
    capsys.readouterr()
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32)
    written = json.loads((out / "config.json").read_text())
    assert {name: written[name] for name in names} == names
    assert written["rope_scaling"] == (scaling and scaling | {"type": "linear"})
    ids = torch.arange(48).view(1, -1)
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids).logits, model(ids).logits)
    assert not capsys.readouterr().err


def test_the_dtype_is_there_under_both_of_its_names(composite, tokenizer, tmp_path):
    """transformers 4.53.3 reads `torch_dtype` alone, in each part."""
    out = export_model(
        transformers.Qwen3_5ForConditionalGeneration.from_pretrained(composite),
        tokenizer,
        tmp_path / "out",
        dtype=torch.bfloat16,
    )
    written = json.loads((out / "config.json").read_text())
    for part in (written, written["text_config"], written["vision_config"]):
        assert part["torch_dtype"] == part["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", True),  # sentencepiece's first piece: a protocol buffer
        (b"IQ== 0\nIg== 1\n", False),  # tiktoken's file has the same name, and no converter reads it
    ],
)
def test_the_vocabulary_of_sentencepiece_goes_along(content, kept, tokenizer, tmp_path):
    base, model = tmp_path / "base", random_model(AutoConfig.for_model("gemma2", **TINY))
    export_model(model, tokenizer, base, dtype=torch.float32)
    (base / "tokenizer.model").write_bytes(content)
    out = export_model(load_model(base), load_tokenizer(base), tmp_path / "out", dtype=torch.float32, base=str(base))
    assert [file.read_bytes() for file in out.glob("tokenizer.model")] == [content] * kept
    assert AutoTokenizer.from_pretrained(out)(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
