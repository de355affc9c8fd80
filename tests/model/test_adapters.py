"""Adapters inside a model: what the loss sees of them, what is trained, written and merged (T15, T16, T22, T30)."""

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.components import AdamW
from sftmix.model.adapters import UNTIES, add_adapters
from sftmix.model.export import export_model
from sftmix.model.head import check_head, head_of
from sftmix.model.layers import recompute_activations
from sftmix.model.load import load_model
from sftmix.model.mapped import mapped_model, standing_in
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.tools.runs.adapters import load_adapters, merge_adapters
from sftmix.training.footprint import without_values
from sftmix.training.update import build_optimizer
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.model.test_models import FAMILIES as MODELS
from tests.model.test_models import TINY, batch, build, compare_with_transformers, random_model, tokenizer

__all__ = ["tokenizer"]  # the fixture

FAMILIES = ["llama", "llama tied", "qwen2", "gemma2", "gpt2", "phi (head bias)", "cohere"]
BODY = {"gpt2": ["c_attn", "c_fc"], "phi (head bias)": ["q_proj", "fc1"]}
EMBEDDINGS = {"gpt2": "wte"}

pytestmark = [
    # PEFT and transformers 5.23 ask each other for what has another name by now.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Ours are silent about both (docs/lora.md); PEFT alone, which reads them back, is not.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def adapted(family, *, where="body head embeddings", **options):
    """A tiny model whose adapters do something (B is random), named by where they are."""
    names = {
        "body": BODY.get(family, ["q_proj", "down_proj"]),
        "head": ["lm_head"],
        "embeddings": [EMBEDDINGS.get(family, "embed_tokens")],
    }
    targets = [name for part in where.split() for name in names[part]]
    model = build(family)
    add_adapters(model, LoraOptions(r=4, target_modules=targets, **options), seed=3)
    change(model)
    return model


def change(model):
    """As training does: everything trained moves, and nothing else."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model):
    ids, mask, _ = batch(61)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["body", "body head embeddings"])
def test_the_loss_sees_adapters_on_head_and_embeddings(family, where):
    """T30: the head's formula gives the model's logits, and every adapter the gradient of the model's own loss."""
    model = adapted(family, where=where, use_rslora=True)
    assert float((logits(model) - logits(build(family))).abs().max()) > 0.01  # the adapters do something
    check_head(model)
    compare_with_transformers(model)
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trainable(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    head = [name for name in trainable(model) if name.startswith("lm_head.lora_")]
    assert len(head) == (2 if "head" in where else 0)


@pytest.mark.skipif(Version(transformers.__version__) < UNTIES, reason="refused with this transformers")
@pytest.mark.parametrize("family", ["llama tied", "gpt2"])
def test_the_head_in_full(family):
    model = adapted(family, where="body", modules_to_save=["lm_head"])
    assert "lm_head.modules_to_save.default.weight" in trainable(model)
    check_head(model)
    compare_with_transformers(model)
    assert float(head_of(model).weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("options", "named"), [({"use_dora": True}, "use_dora"), ({"lora_dropout": 0.1}, "lora_dropout")]
)
def test_what_the_loss_cannot_follow_on_the_head_is_refused(options, named):
    model = adapted("llama", **options)
    with pytest.raises(ConfigError, match=rf"model\.lora\.{named} and an adapter on the LM head exclude each other"):
        head_of(model)
    check_head(adapted("llama", where="body embeddings", **options))
    check_head(adapted("llama", where="body", modules_to_save=["lm_head"], **options))


@pytest.mark.parametrize(("where", "dropout"), [("body", 0.0), ("body head embeddings", 0.0), ("body", 0.3)])
def test_recomputed_activations_change_no_gradient(where, dropout):
    """T22: also where nothing before the first adapter is trained; and what is dropped is dropped again."""
    gradients = []
    for recompute in (False, True):
        model = adapted("llama", where=where, lora_dropout=dropout).train()
        torch.manual_seed(7)
        if recompute:
            recompute_activations(model)
        ids, mask, labels = batch(61)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][k], gradients[1][k]) for k in gradients[0])


@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize(
    "where", ["body", "body head", "body embeddings", "body head embeddings", "HEAD", "EMBEDDINGS"]
)
def test_a_copy_on_fake_tensors_has_the_parameters_of_the_model(family, where):
    """Tied ones under all their names: an adapter on the LM head shows its weight, which cannot be set there."""
    in_full = {"HEAD": "lm_head", "EMBEDDINGS": EMBEDDINGS.get(family, "embed_tokens")}
    if where in in_full and family != "llama" and Version(transformers.__version__) < UNTIES:
        pytest.skip("refused with this transformers")
    options = {"where": "body", "modules_to_save": [in_full[where]]} if where in in_full else {"where": where}
    model = adapted(family, **options)
    module, _ = without_values(model, halved=False)
    assert described(module.model) == described(model)
    assert {type(one) for one in [*module.parameters(), *module.buffers()]} == {FakeTensor}


def described(model):
    """Every name of a parameter -> the first of its names, its shape, its dtype, and whether it is trained."""
    named = list(model.named_parameters(remove_duplicate=False))
    first = {id(one): name for name, one in reversed(named)}
    return {name: (first[id(one)], one.shape, one.dtype, one.requires_grad) for name, one in named}


# ------------------------------------------------------------------------------------------- what is trained


def test_only_adapters_are_trained_and_in_float32():
    model = adapted("llama", where="body")
    assert {name.split(".")[-3] for name in trainable(model)} == {"lora_A", "lora_B"}
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    groups = build_optimizer(model, TrainingOptions(), AdamW()).param_groups
    # rank 4, two layers: q_proj is 32 x 32, down_proj 48 -> 32
    assert sum(p.numel() for group in groups for p in group["params"]) == 2 * (4 * (32 + 32) + 4 * (48 + 32))


def test_initial_values_are_a_function_of_the_seed():
    torch.manual_seed(11)
    expected = torch.rand(1)
    one, same, other = (build("llama") for _ in range(3))
    torch.manual_seed(11)
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        add_adapters(model, LoraOptions(r=4), seed=seed)
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers were taken
    left, right, third = (trainable(m) for m in (one, same, other))
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert not all(torch.equal(left[k], third[k]) for k in left)
    assert torch.equal(logits(one), logits(build("llama")))  # B is zero: training begins at the base model


BESIDE = {
    "llama": {"init_lora_weights": False},
    "llama tied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "init_lora_weights": "orthogonal"},
    "phi (head bias)": {"bias": "lora_only", "modules_to_save": ["lm_head"], "init_lora_weights": "gaussian"},
    "gpt2": {"bias": "all"},
    "Qwen3Moe": {"target_modules": ["all-linear", "lm_head"]},
}


@pytest.mark.parametrize("family", BESIDE)
def test_adapters_beside_mapped_values_are_those_of_a_plain_load(family, tmp_path):
    """Both in float32, and the frozen values of the files where they were mapped, in bfloat16."""
    made = build(family) if family in MODELS else experts(family)
    made.bfloat16().save_pretrained(tmp_path)
    lora, plain, mapped = LoraOptions(r=4, **BESIDE[family]), load_model(tmp_path), mapped_model(tmp_path)
    places = {p.data_ptr() for p in mapped.parameters()}
    add_adapters(plain, lora, seed=5)
    with standing_in(mapped):
        add_adapters(mapped, lora, seed=5)
    found = dict(mapped.named_parameters())
    assert list(found) == [name for name, _ in plain.named_parameters()]
    for name, expected in plain.named_parameters():
        assert torch.equal(found[name].float(), expected), name
        assert found[name].requires_grad == expected.requires_grad
        assert (found[name].data_ptr() in places) is ("lora_" not in name), name
        assert found[name].dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "qproj"]},
            r"target_modules: LlamaForCausalLM has no module qproj; .*q_",
        ),
        ({"modules_to_save": ["lmhead"]}, r"modules_to_save: LlamaForCausalLM has no module lmhead; .*lm_head"),
        ({"target_modules": "nothing"}, r"model\.lora: PEFT refuses"),
        ({"init_lora_weights": "orthogonal", "r": 3}, r"model\.lora: PEFT refuses .*even"),
    ],
)
def test_what_peft_would_ignore_or_refuse_is_a_message(options, message):
    with pytest.raises(ConfigError, match=message):
        add_adapters(build("llama"), LoraOptions(**{"r": 4, **options}), seed=0)


def experts(family):
    """A model whose experts and routers are no linear layers, but tensors of their own."""
    few = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}
    return random_model(getattr(transformers, f"{family}Config")(**TINY | few))


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
OF_EXPERTS = {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate"}


@pytest.mark.parametrize(
    ("made", "family", "parts"),
    [
        (build, "llama", LLAMA),
        (build, "gpt2", {"c_attn", "c_proj", "c_fc"}),
        *((experts, family, OF_EXPERTS) for family in ("Mixtral", "Qwen3Moe", "Olmoe")),
    ],
)
def test_all_linear_is_all_but_the_head_which_a_list_adds(made, family, parts):
    found = []
    for targets in ("all-linear", ["all-linear"], ["all-linear", "lm_head"]):
        model = made(family)
        add_adapters(model, LoraOptions(r=4, target_modules=targets), seed=0)
        found.append({name: p.shape for name, p in trainable(model).items()})
    assert found[0] == found[1]
    assert found[2].keys() == found[0].keys() | {f"lm_head.lora_{x}.default.weight" for x in "AB"}
    assert {name.split(".lora_")[0].removesuffix(".base_layer").split(".")[-1] for name in found[0]} == parts


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_adapters_of_experts_are_merged(family, tokenizer, tmp_path):
    model = experts(family)
    add_adapters(model, LoraOptions(r=4), seed=0)
    change(model)
    expected = logits(model)
    merge_adapters(model)
    assert float((logits(model) - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    export_model(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    plain = load_model(tmp_path / "merged")
    assert float((logits(plain) - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_modules())


MAMBA = {"num_hidden_layers": 4, "mamba_d_state": 4, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1}
MAMBA |= {"attention_hidden_size": 64, "attention_head_dim": 16, "adapter_rank": 4, "chunk_size": 16}
MAMBA |= {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "use_mem_rope": True}


@pytest.mark.parametrize(("targets", "merged"), [("all-linear", False), (["q_proj"], False), (["in_proj"], True)])
def test_adapters_of_layers_that_share_weights_are_not_merged(targets, merged):
    """Zamba2's attention is one block of weights that several layers use, each with adapters of its own."""
    model = random_model(transformers.Zamba2Config(**TINY | MAMBA))
    add_adapters(model, LoraOptions(r=4, target_modules=targets), seed=0)
    change(model)
    expected = logits(model)
    if merged:
        merge_adapters(model)
        assert float((logits(model) - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    else:
        with pytest.raises(
            ConfigError, match=r"weights of Zamba2ForCausalLM .* other logits, by up to .* without --mer"
        ):
            merge_adapters(model)


# ---------------------------------------------------------------------------------------- export and merging

EVERYWHERE = {"where": "body head embeddings"}
KINDS = {
    **{f"{family}, everywhere": (family, EVERYWHERE) for family in FAMILIES},
    **{f"{family}, body": (family, {"where": "body"}) for family in FAMILIES},
    "only the tied head": ("llama tied", {"where": "head"}),
    "only the tied embeddings": ("gpt2", {"where": "embeddings"}),
    "tied head in full": ("llama tied", {"where": "body", "modules_to_save": ["lm_head"]}),
    "tied embeddings in full": ("gemma2", {"where": "body", "modules_to_save": ["embed_tokens"]}),
    "dora": ("llama tied", {"where": "body", "use_dora": True}),
    "rslora": ("qwen2", {"where": "body head", "use_rslora": True}),
    "all biases": ("gpt2", {"where": "body", "bias": "all"}),
    "biases of adapted modules": ("qwen2", {"where": "body", "bias": "lora_only"}),
}


@pytest.mark.parametrize("kind", some_fast(KINDS, every=3))
def test_adapters_and_merged_model_are_the_trained_model(kind, tokenizer, tmp_path):
    """T15, T16: read back by PEFT, by transformers alone, and merged, the logits are those of the trained model."""
    import peft

    family, options = KINDS[kind]
    if Version(transformers.__version__) < UNTIES and "modules_to_save" in options:
        with pytest.raises(ConfigError, match=r"modules_to_save names one of two tied weights, and transformers 5\.1"):
            adapted(family, **options)
        return
    if Version(peft.__version__) < Version("0.21") and options.get("bias") == "lora_only":
        pytest.skip(f"PEFT {peft.__version__} cannot write them, and they are refused")
    base = tmp_path / "base"
    build(family).save_pretrained(base)
    model = adapted(family, **options)
    expected = logits(model)
    limit = 2e-5 * float(expected.abs().max())
    adapters = export_model(
        model, tokenizer, tmp_path / "adapters", dtype=torch.float32, base=str(base), stop_ids=[4], chat_template="x"
    )
    written = load_file(adapters / "adapter_model.safetensors")
    assert sum(x.numel() for x in written.values()) == sum(p.numel() for p in trainable(model).values())
    assert not (adapters / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(adapters).chat_template == "x"

    by_transformers = AutoModelForCausalLM.from_pretrained(adapters, dtype=torch.float32)
    by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters)
    put_back = build(family)
    load_adapters(put_back, adapters)
    merge_adapters(put_back)
    for read in (by_transformers, by_peft, put_back):
        assert float((logits(read) - expected).abs().max()) <= limit

    tied = model.config.tie_word_embeddings
    merge_adapters(model)
    merged = export_model(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    plain = load_model(merged)
    assert float((logits(plain) - expected).abs().max()) <= limit
    assert not any("lora" in name or "base_layer" in name for name, _ in plain.named_modules())
    assert plain.config.tie_word_embeddings == (tied and options["where"] == "body" and not kind.startswith("tied"))


def test_a_missing_adapter_is_not_written(tokenizer, tmp_path):
    """T15: what one rank's shard would be."""
    model = adapted("llama", where="body")
    some = dict(list(trainable(model).items())[1:])
    with pytest.raises(ConfigError, match="numbers that are trained"):
        export_model(model, tokenizer, tmp_path / "a", dtype=torch.float32, weights=some.items(), base="b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("family", "options"), [("Mixtral", {"use_dora": True}), ("Phimoe", {})])
def test_adapters_that_experts_cannot_have_are_refused_with_a_remedy_that_works(family, options):
    config = getattr(transformers, f"{family}Config")(**TINY, num_local_experts=4, num_experts_per_tok=2)

    def adapted(targets: str | list[str]) -> None:
        model = random_model(config)
        add_adapters(model, LoraOptions(r=2, target_modules=targets, **options), seed=0)
        check_head(model, trains=True)

    with pytest.raises(ConfigError, match=r"all-linear also takes experts .*target_modules '\[q_proj, v_proj\]'"):
        adapted("all-linear")
    adapted(["q_proj", "v_proj"])
