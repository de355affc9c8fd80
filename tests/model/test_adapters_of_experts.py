"""Adapters of models with experts: where they are, as named or not, and who reads them back under their names."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from sftmix.model.adapters import WEIGHTS, adapted_kinds, add_adapters
from sftmix.model.compared import say_once
from sftmix.model.export import export_model
from sftmix.model.load import load_model
from sftmix.model.probes import adapters_left_out, before_adapters, untrained_rows
from sftmix.options import LoraOptions
from sftmix.tools.runs.adapters import load_adapters, merge_adapters
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.model.test_adapters import change, logits
from tests.model.test_models import TINY, build, random_model, tokenizer

__all__ = ["tokenizer"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}
LATENT = {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT |= {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_shared_experts": 1, "head_dim": None}
GLM = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LAGUNA = {"num_attention_heads_per_layer": [4, 4], "mlp_layer_types": ["dense", "sparse"], "sliding_window": 16}
LAGUNA |= {"shared_expert_intermediate_size": 16}
HYBRID = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "unpadded_vocab_size": 61}
HYBRID |= {"layer_types": ["hybrid_sliding", "hybrid"], "d_rel": 4, "rel_extent": 8, "sliding_window_size": 16}
FAMILIES = {
    "laguna": LAGUNA,
    "deepseek_v3": LATENT,
    "glm4_moe": GLM,
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "deepseek_v2": LATENT,
    "dots1": GLM,
    "hunyuan_v1_moe": {"moe_topk": 2},
    "afmoe": {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "olmoe": {},
    "minimax_m2": {},
    "inkling2_text": HYBRID | {"n_routed_experts": 4, "num_local_experts": None, "num_experts": None},
}


@pytest.fixture(autouse=True)
def said_anew():
    say_once.cache_clear()


def model_of(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    options = {name: value for name, value in (TINY | ROUTED | FAMILIES[family]).items() if value is not None}
    return random_model(CONFIG_MAPPING[family](**options))


# ----------------------------------------------------------------------------------------------- where they are

KINDS = {
    "routed experts": ".experts.",
    "shared experts": ".shared_",
    "routers": ".mlp.gate.",
    "attention": ".self_attn.",
    "dense": ".0.mlp.",
}
"""Of the families below, whose first layer is dense: what only the names of these weights have."""


@pytest.mark.parametrize("targets", ["all-linear", SEVEN, ["o_proj", "gate"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("family", ["glm4_moe", "laguna", "deepseek_v3"])
def test_the_kinds_with_adapters_are_those_that_a_merge_changes(family, targets):
    if family == "laguna" and "gate" in targets:
        pytest.skip("PEFT has no adapters for its router")
    model = model_of(family)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    before = {name: x.clone() for name, x in model.model.named_parameters() if x.dim() > 1 and "embed" not in name}
    chosen = targets if targets == "all-linear" else [name for name in targets if name in names]
    add_adapters(model, LoraOptions(r=2, target_modules=chosen), seed=0)
    line = adapted_kinds(model)
    change(model)
    merge_adapters(model)
    after = dict(model.model.named_parameters())
    for kind, inside in KINDS.items():
        sizes = {name: x.numel() for name, x in before.items() if inside in f".{name}"}
        changed = sum(size for name, size in sizes.items() if not torch.equal(after[name], before[name]))
        assert f"{kind} {changed / sum(sizes.values()):.1%}" in line


def test_a_model_without_experts_gets_a_line_of_its_two_kinds():
    model = build("llama")
    add_adapters(model, LoraOptions(r=2, target_modules=["q_proj", "o_proj"]), seed=0)
    # of a layer: q and o 32 x 32, k and v 32 x 16
    assert adapted_kinds(model).endswith(f"by kind: attention {2 / 3:.1%}, dense 0.0%")


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("name", ["layers.1.mlp.shared_experts.down_proj", "layers.0.mlp.down_proj"])
def test_a_name_for_which_others_would_get_adapters_is_refused(family, name):
    with pytest.raises(ConfigError) as refused:
        add_adapters(model_of(family), LoraOptions(r=2, target_modules=["o_proj", name]), seed=0)
    assert f"model.lora.target_modules: {name} would get no adapters: PEFT takes such names of" in str(refused.value)
    assert "for its routed experts and routers, in all layers. Leave them out" in str(refused.value)


def test_modules_that_are_named_and_get_none_are_counted(capsys):
    """Three of the dense layer, and three of the shared expert in the other one."""
    model = model_of("glm4_moe")
    fitting = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in SEVEN]
    add_adapters(model, LoraOptions(r=2, target_modules=SEVEN), seed=0)
    left = [name for name in fitting if not hasattr(model.get_submodule(name), "lora_A")]
    told = capsys.readouterr().err
    assert len(left) == 6
    assert f"PEFT gives no adapters to 6 modules ({', '.join(sorted(left)[:3])}, ...) that these names fit" in told


@pytest.mark.parametrize("family", ["laguna", "qwen2_moe", "llama"])
def test_names_that_all_get_adapters_need_no_line(family, capsys):
    model = build("llama") if family == "llama" else model_of(family)
    add_adapters(model, LoraOptions(r=2, target_modules=SEVEN), seed=0)
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ read by others


def adapted(family, directory):
    model_of(family).save_pretrained(directory / "base")
    model = load_model(directory / "base")
    add_adapters(model, LoraOptions(r=2), seed=0)
    change(model)
    return model


@pytest.mark.filterwarnings("ignore")  # PEFT's, of what it leaves out, and of ranks that it has given itself
@pytest.mark.parametrize("family", some_fast(list(FAMILIES), every=4))
def test_what_a_line_says_before_the_training_is_what_others_read(family, tokenizer, tmp_path, capsys):
    """No line: PEFT and transformers have the logits of the training. A line: they have not."""
    model, base = adapted(family, tmp_path), str(tmp_path / "base")
    before = list(adapters_left_out(model, base))
    expected = logits(model)
    capsys.readouterr()
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32, base=base)
    after = capsys.readouterr().err
    assert after.count("\n") == bool(after)
    by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    others = [logits(AutoModelForCausalLM.from_pretrained(out)), logits(by_peft)]
    for reader, read in zip(("transformers", "PEFT"), others, strict=True):
        same = float((read - expected).abs().max()) < 2e-5 * float(expected.abs().max())
        assert any(f"and {reader} on {type(model).__name__} leaves out" in line for line in before) is not same
        assert reader == "PEFT" or (f"{out}: AutoModelForCausalLM reads another model from it: " in after) is not same


def test_what_others_leave_out_loads_here_and_can_be_merged(tokenizer, tmp_path, capsys):
    model = adapted("laguna", tmp_path)
    expected = logits(model)
    told = "".join(adapters_left_out(model, str(tmp_path / "base")))
    assert told.count("leaves out 6 weights (") == 2
    assert told.count("of them, without a word: export with --merge for it") == 2
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32, base=str(tmp_path / "base"))
    capsys.readouterr()
    assert sum(".shared_experts." in name for name in load_file(out / WEIGHTS)) == 6
    again = load_model(tmp_path / "base")
    load_adapters(again, out)
    assert torch.equal(logits(again), expected)
    merge_adapters(again)
    merged = export_model(again, tokenizer, tmp_path / "merged", dtype=torch.float32)
    assert float((logits(load_model(merged)) - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert not capsys.readouterr().err


def test_adapters_whose_values_were_lost_on_the_way_get_a_line(tokenizer, tmp_path, capsys, monkeypatch):
    """Names are right, a scale is not: as a key of adapter_config.json that others read in another way."""
    model = adapted("qwen3_moe", tmp_path)
    write = model.peft_config["default"].__class__.save_pretrained

    def other_scale(config, *rest):
        config.alpha_pattern = {}
        write(config, *rest)

    monkeypatch.setattr(model.peft_config["default"].__class__, "save_pretrained", other_scale)
    out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32, base=str(tmp_path / "base"))
    assert f"{out}: AutoModelForCausalLM reads another model from it: by up to " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- untrained rows


def test_rows_that_look_untrained_are_found():
    """The mean of the others, a copy of another: as reserved and added tokens have them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=generator) + 3 * torch.randn(16, generator=generator)
    weight[4] = weight.mean(0) + 0.01 * torch.randn(16, generator=generator)
    weight[8] = weight[9]
    for kind in (weight, weight.bfloat16()):
        assert untrained_rows(kind, range(50)) == [4, 8, 9]


@pytest.mark.parametrize(
    ("lora", "said"),
    [({}, True), ({"modules_to_save": ["lm_head"]}, False), ({"target_modules": ["q_proj", "lm_head"]}, False)],
)
def test_an_end_token_with_an_untrained_row_is_named_unless_the_head_is_trained(lora, said, tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[4] = model.lm_head.weight[5]
    model.save_pretrained(tmp_path)
    add_adapters(model, LoraOptions(r=2, **lora), seed=0)
    lines = list(before_adapters(model, str(tmp_path), [(2, "</s>"), (4, "<end>")]))
    assert [line for line in lines if "look untrained" in line] == lines[1:]
    assert ("rows of <end>, which end answers, look untrained beside the others" in "".join(lines)) is said
