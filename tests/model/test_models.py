"""Model families, their heads, and what is exported; tiny random models, and the real ones where they are there."""

import json
from functools import cache

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sftmix.functional import SFTMixLoss
from sftmix.model.export import export_model
from sftmix.model.head import check_head, head_of
from sftmix.model.load import check_ids, load_model, load_tokenizer, stored_dtype
from sftmix.words.errors import ConfigError
from tests.fast import some_fast

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SUMS = 2 * (5 * 32 + 48)
"""Numbers that one state of such a model is the sum of: in two layers, over its inputs for q, k, v, o and the MLP."""
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2}

# Scales and caps far from 1, so that leaving one out shows. Random heads are small: the caps are, too.
FAMILIES = {
    "llama": ("Llama", TINY),
    "llama tied": ("Llama", TINY | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", TINY),
    "qwen2": ("Qwen2", TINY),
    "qwen3": ("Qwen3", TINY),
    "gemma2": ("Gemma2", TINY | {"final_logit_softcapping": 0.3}),
    "gemma3": ("Gemma3Text", TINY | {"final_logit_softcapping": 0.3, "layer_types": ["full_attention"] * 2}),
    "gpt2": ("GPT2", GPT2),
    "phi3": ("Phi3", TINY),
    "phi (head bias)": ("Phi", TINY),
    "olmo2": ("Olmo2", TINY),
    "granite": ("Granite", TINY | {"logits_scaling": 3.0}),
    "hyperclovax": ("HyperCLOVAX", TINY | {"logits_scaling": 3.0}),
    "cohere": ("Cohere", TINY | {"logit_scale": 0.35}),
    "cohere2": ("Cohere2", TINY | {"logit_scale": 0.35}),
}


def build(family):
    name, options = FAMILIES[family]
    return random_model(getattr(transformers, f"{name}Config")(**options))


def random_model(config, attention=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0, and would hide a mistake
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models():
    return cache(build)


@pytest.fixture
def tokenizer():
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<end>", "hello", "world"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def batch(vocabulary):
    """Two padded sequences with a masked prompt, and with some prompt-like gap inside."""
    ids = torch.randint(3, vocabulary, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[1, :2] = labels[0, 6] = -100
    return ids, mask, labels


def compare_with_transformers(model):
    """Loss and gradients, by the backbone, the head's fields and the criterion, are those of the model's own loss."""
    ids, mask, labels = batch(model.get_input_embeddings().weight.shape[0])
    model.zero_grad()
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    head, none = head_of(model), torch.zeros(0, 2, dtype=torch.int64)
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    ntp = SFTMixLoss(0.0, softcap=head.softcap, scale=head.scale)
    ours = ntp(hidden, head.weight, labels, none, torch.zeros(0), bias=head.bias).loss
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_ntp_equals_the_models_own_loss(family, models):
    compare_with_transformers(models(family))


@pytest.mark.parametrize("name", ["base-7m", "stories260K"])
def test_ntp_equals_the_models_own_loss_on_real_models(name, shared):
    model = load_model(shared / "models" / name)
    check_head(model)
    compare_with_transformers(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_fits(family, models):
    model = models(family).train()
    head, options = check_head(model), FAMILIES[family][1]
    assert model.training
    model.eval()
    assert head == head_of(model)
    assert head.softcap == options.get("final_logit_softcapping")
    scaling = options.get("logits_scaling", 1.0)
    expected = options.get("logit_scale", scaling if family == "hyperclovax" else 1 / scaling)
    assert head.scale == expected
    assert (head.bias is not None) is (family == "phi (head bias)")


def test_head_follows_a_replaced_parameter():
    """FSDP exchanges the parameter objects: the head must read them when used."""
    model = build("llama")
    head = head_of(model)
    model.lm_head.weight = torch.nn.Parameter(torch.ones_like(model.lm_head.weight))
    assert head.weight is model.lm_head.weight


class OddlyScaled(transformers.LlamaForCausalLM):
    """A head with a factor that no config names."""

    factor = 1.01

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.factor
        return out


def test_unknown_head_is_refused():
    torch.manual_seed(0)
    model = OddlyScaled(transformers.LlamaConfig(**TINY))
    with pytest.raises(
        ConfigError, match=r"OddlyScaled \(llama\) is not supported: its logits differ .* by up to 0\.0"
    ):
        check_head(model)
    model.factor = 1.0
    check_head(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[3, 2] = float("nan")
    with pytest.raises(ConfigError, match=r"not finite numbers, .* 1 weights \(model\.layers\.1\.mlp\.up_proj\.weight"):
        check_head(model)


def test_models_without_a_decoder_head_are_refused(models):
    backbone = models("llama").model
    with pytest.raises(ConfigError, match="not a decoder with an LM head"):
        head_of(backbone)


def test_a_model_that_is_its_own_decoder_is_refused_by_name():
    sizes = {"intermediate_size_mlp": 48, "num_local_experts": 2}
    with pytest.raises(
        ConfigError, match=r"Llama4ForCausalLM is not a decoder .* or gives no states before it \(get_decoder\)"
    ):
        check_head(random_model(transformers.Llama4TextConfig(**TINY, **sizes)))


def test_a_cap_of_another_name_is_found():
    config = transformers.RecurrentGemmaConfig(**TINY, lru_width=32, attention_window_size=8, logits_soft_cap=3.0)
    assert check_head(random_model(config)).softcap == 3.0
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "output_logit_soft_cap": 3.0}
    assert check_head(random_model(transformers.xLSTMConfig(**sizes))).softcap == 3.0


def test_a_model_whose_decoder_is_its_head_is_refused_by_name():
    ids = dict.fromkeys((f"{role}_token_id" for role in ("pad", "bos", "eos", "cls", "sep")), 0)
    config = transformers.ModernBertDecoderConfig(**TINY | ids)
    with pytest.raises(ConfigError, match="ModernBertDecoderForCausalLM is not a decoder with an LM head"):
        check_head(random_model(config))


# -------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("path", ["/no/such/directory", "", "nobody/nothing-of-that-name"])
def test_missing_model(path):
    for load in (load_model, load_tokenizer, stored_dtype):
        with pytest.raises(ConfigError, match=r"model\.path"):
            load(path)


def test_missing_weights_are_refused(tmp_path):
    model = build("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"1 weights of the model \(model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path)


def test_vocabulary_is_never_resized(tokenizer):
    """Ids count, not tokens: a spare token is one thing, a row or a padding that has it another."""
    config = build("llama").config
    check_ids(config, tokenizer, [4, 60])
    tokenizer.add_tokens([f"<extra{i}>" for i in range(55)])
    assert len(tokenizer) == 62
    check_ids(config, tokenizer, [4, 60])
    with pytest.raises(ConfigError, match=r"'<extra54>' has id 61, the model embeddings for 61 ids"):
        check_ids(config, tokenizer, [61, 4])


# --------------------------------------------------------------------------------------------------- export


def reload(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("family", some_fast(FAMILIES, every=3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_reloads_bitwise(family, dtype, models, tokenizer, tmp_path):
    model = models(family)
    path = export_model(model, tokenizer, tmp_path / "model", dtype=dtype, stop_ids=[4])
    again = reload(path)
    assert again.dtype == stored_dtype(path) == dtype
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert torch.equal(state[name], x.to(dtype)), name
    assert model.dtype == torch.float32


def test_tied_weights_are_stored_once(tokenizer, tmp_path):
    """Also from a gathered state dict, in which the two names no longer share memory."""
    model = build("llama tied")
    gathered = {name: x.clone() for name, x in model.state_dict().items()}
    path = export_model(model, tokenizer, tmp_path / "model", dtype=torch.float32, weights=gathered.items())
    with safe_open(path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "lm_head.weight" not in keys
    assert "model.embed_tokens.weight" in keys
    again = reload(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_every_stop_id_is_written(tokenizer, tmp_path):
    model = build("llama")
    model.generation_config.eos_token_id = [2, 5]
    model.generation_config.temperature = 0.7  # without do_sample, as on some hub models
    path = export_model(model, tokenizer, tmp_path / "model", dtype=torch.float32, stop_ids=[4, 2])
    config = json.loads((path / "generation_config.json").read_text())
    assert config["eos_token_id"] == [2, 5, 4]
    assert config["pad_token_id"] == 0
    assert model.generation_config.eos_token_id == [2, 5]


GENERATION = {
    "no pad": ({"pad_token_id": -1}, {}),
    "beams only": ({"early_stopping": True, "length_penalty": 2.0}, {}),
    "greedy": ({"do_sample": False, "temperature": 0.5, "top_k": 1}, {"do_sample": False}),
    "implied": ({"temperature": 0.6, "top_k": 20}, {}),
    "sampled": ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
    "one refused": (
        {"length_penalty": 2.0, "temperature": 0.6, "do_sample": True},
        {"do_sample": True, "temperature": 0.6},
    ),
    "others": ({"max_length": 20, "of_theirs": 3}, {"max_length": 20, "of_theirs": 3}),
}
"""Options of a base model's generation_config, and what is exported of them."""


@pytest.mark.parametrize("name", GENERATION)
def test_no_generation_config_of_a_base_model_stops_the_export(name, tokenizer, tmp_path):
    given, expected = GENERATION[name]
    build("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **given}))
    path = export_model(load_model(tmp_path / "base"), tokenizer, tmp_path / "model", dtype=torch.float32)
    written = json.loads((path / "generation_config.json").read_text())
    del written["transformers_version"]
    assert written == {"eos_token_id": 2, "pad_token_id": 0, **expected}
    reload(path).generate(torch.arange(3, 7)[None], max_length=6)


def test_chat_template_travels(tokenizer, tmp_path):
    model = build("llama")
    export_model(model, tokenizer, tmp_path / "a", dtype=torch.float32, chat_template="{{ messages[0].content }}<end>")
    assert tokenizer.chat_template is None
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    message = [{"role": "user", "content": "hello"}]
    assert again.apply_chat_template(message, tokenize=False) == "hello<end>"
    export_model(model, again, tmp_path / "b", dtype=torch.float32, chat_template="other")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").apply_chat_template(message, tokenize=False) == "other"


def test_export_is_complete_or_absent(tokenizer, tmp_path, monkeypatch):
    model, path = build("llama"), tmp_path / "model"
    export_model(model, tokenizer, path, dtype=torch.float32)
    before = (path / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_model(model, tokenizer, path, dtype=torch.bfloat16)
    assert (path / "model.safetensors").read_bytes() == before
    assert stored_dtype(path) == torch.float32
    export_model(model, tokenizer, path, dtype=torch.bfloat16)
    assert stored_dtype(path) == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
