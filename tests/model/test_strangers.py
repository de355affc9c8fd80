"""Models of strangers: odd files, attention, losses and tokenizers are followed, or named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.model.export import export_model
from sftmix.model.head import check_head
from sftmix.model.load import load_model
from sftmix.model.mapped import mapped_model
from sftmix.tools.answers.answering import generated
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.runs.loaded import load_finished
from sftmix.tools.runs.models import finished_models
from sftmix.words.errors import ConfigError
from tests.logs import messages_of
from tests.model.test_models import GPT2, TINY, random_model
from tests.text.small_tokenizers import SMALL
from tests.tiny import SHORT, in_this_process

MOE = TINY | {"moe_intermediate_size": 16, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

# ---------------------------------------------------------------------------------------------- weights of files


def with_weights(model, directory, *names):
    """Save a model, with more weights in its file."""
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2) for name in names}, file, metadata={"format": "pt"})


INSIDE = {
    "a layer more": ("llama", "model.layers.2.mlp.up_proj.weight"),
    "a bias": ("llama", "model.layers.0.self_attn.q_proj.bias"),
    "a bias of the head": ("llama", "lm_head.bias"),
    "adapters": ("llama", "model.layers.1.self_attn.q_proj.lora_A.weight"),
    "adapters by PEFT's names": ("llama", "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"),
    "a norm": ("llama", "model.layers.0.self_attn.q_norm.weight"),
    "a layer more of another family": ("gpt2", "transformer.h.2.ln_1.weight"),
    "without the prefix": ("gpt2", "h.2.ln_1.weight"),
}
BESIDE = ["vision_tower.encoder.layers.0.weight", "mtp.layers.0.weight", "v_head.summary.weight", "score.weight"]
BESIDE += ["model.visual.blocks.0.weight", "multi_modal_projector.linear.weight"]


def model_of(family):
    config = transformers.LlamaConfig(**TINY) if family == "llama" else transformers.GPT2Config(**GPT2)
    return random_model(config)


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("load", [load_model, mapped_model])
def test_weights_without_a_place_in_the_decoder_are_refused(kind, load, tmp_path):
    family, name = INSIDE[kind]
    with_weights(model_of(family), tmp_path, name, "vision_tower.weight")
    with pytest.raises(
        ConfigError, match=r"holds 1 weights \((model\.)?\S+, \.\.\.\) for which .* has no place"
    ) as error:
        load(tmp_path)
    assert name.removeprefix("transformer.") in str(error.value)


def test_other_weights_are_left_out_with_one_line(tmp_path, capsys):
    """transformers' own table is not shown beside it."""
    harmless = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_weights(model_of("llama"), tmp_path, harmless, *BESIDE)
    with messages_of("transformers") as messages:
        for _ in range(2):
            load_model(tmp_path)
    assert not [message for message in messages if "LOAD REPORT" in message]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    shown = ", ".join(sorted(BESIDE)[:3])
    assert line == f"model.path: {tmp_path}: left out 6 weights ({shown}, ...), no part of LlamaForCausalLM"


def test_shapes_of_another_config_are_shown_by_transformers(tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with messages_of("transformers") as messages, pytest.raises(ConfigError, match="cannot load"):
        load_model(tmp_path)
    assert [message for message in messages if "MISMATCH" in message]


def test_a_head_of_its_own_stays_one(tmp_path):
    """config.json says tied, but the files have another head: what is computed is what is exported."""
    model = random_model(transformers.LlamaConfig(**TINY, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ids = torch.arange(3, 12)[None]
    for load in (load_model, mapped_model):
        loaded = load(tmp_path / "base")
        assert not loaded.config.tie_word_embeddings
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    export_model(loaded, SMALL["chatml"](), tmp_path / "out", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


# ---------------------------------------------------------------------------------------- later tokens, losses


class LooksAhead(transformers.LlamaForCausalLM):
    """A layer adds a little of the next token's state, as no config says."""

    def __init__(self, config):
        super().__init__(config)
        ahead = lambda module, inputs, out: out + 0.01 * out.roll(-1, dims=1)  # noqa: E731
        self.model.layers[0].mlp.register_forward_hook(ahead)


SEEING = {
    "is_causal": lambda: random_model(transformers.LlamaConfig(**TINY, is_causal=False)),
    "gemma3": lambda: random_model(transformers.Gemma3TextConfig(**TINY, **SLIDING, use_bidirectional_attention=True)),
    "bert": lambda: random_model(transformers.BertGenerationConfig(**TINY, is_decoder=False)),
    "a layer of its own": lambda: LooksAhead(transformers.LlamaConfig(**TINY)).eval(),
}


class Renormalised(transformers.LlamaForCausalLM):
    """It keeps the length of a weight."""

    def forward(self, *inputs, **more):
        with torch.no_grad():
            self.lm_head.weight.div_(self.lm_head.weight.norm())
        return super().forward(*inputs, **more)


def rwkv(**more):
    sizes = {"vocab_size": 61, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 8}
    return random_model(transformers.RwkvConfig(**sizes, context_length=64, **more))


@pytest.mark.parametrize("model", [rwkv, lambda: Renormalised(transformers.LlamaConfig(**TINY)).eval()])
def test_a_model_that_changes_its_own_weights_is_refused(model):
    """RWKV halves some in each pass in eval mode: an export would have them so."""
    with pytest.raises(ConfigError, match=r"changes its own weights when it runs \(.*weight\).*rescale_every to 0"):
        check_head(model())
    check_head(rwkv(rescale_every=0), trains=True)


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_sees_later_tokens_is_refused(kind, dtype):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="sees later tokens"):
        check_head(SEEING[kind]().to(dtype))


@pytest.mark.parametrize("family", ["Gemma3Text", "Mixtral", "Qwen3Moe", "Olmoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_model_is_not(family, dtype):
    """Experts get other numbers of tokens, so their matmuls are rounded otherwise."""
    more = SLIDING if family == "Gemma3Text" else {}
    check_head(random_model(getattr(transformers, f"{family}Config")(**MOE, **more)).to(dtype), trains=True)


MIXTURES = {"Mixtral": "router_aux_loss_coef", "Qwen3Moe": "router_aux_loss_coef", "JetMoe": "aux_loss_coef"}


def mixture(family, coefficient):
    options = MOE | {"output_router_logits": True, MIXTURES[family]: coefficient}
    if family == "JetMoe":
        options |= {"kv_channels": 8, "intermediate_size": 48}
        del options["head_dim"], options["num_attention_heads"]
    return random_model(getattr(transformers, f"{family}Config")(**options))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_loss_with_a_term_of_its_own_is_not_trained_without_a_word(family):
    model, ids = mixture(family, 0.001), torch.arange(16)[None]
    out = model(ids, labels=ids)
    if family == "JetMoe" and out.aux_loss is None:
        pytest.skip(f"transformers {transformers.__version__} does not compute its balance")
    nll = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, nll + 0.001 * out.aux_loss)
    assert out.aux_loss > 1
    with pytest.raises(ConfigError, match=r"another term than the NLL.*output_router_logits"):
        check_head(model, trains=True)
    check_head(model)  # nothing is trained
    check_head(mixture(family, 0.0), trains=True)


def test_labels_that_are_shifted_already_are_no_other_loss():
    options = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.BartConfig(vocab_size=61, is_decoder=True, is_encoder_decoder=False, **options)
    check_head(random_model(config), trains=True)


@pytest.mark.parametrize("family", ["Mixtral", "Gemma3Text"])
def test_prompts_of_different_lengths_are_answered_as_alone(family, tiny, tmp_path):
    """Also with the routers' logits of every batch in the outputs, and with windows shorter than the prompts."""
    size = {"vocab_size": len(AutoTokenizer.from_pretrained(tiny.model))}
    more = {"output_router_logits": True} if family == "Mixtral" else SLIDING
    model = random_model(getattr(transformers, f"{family}Config")(**MOE | size | more))
    shutil.copytree(tiny.model, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    (found,) = finished_models(tmp_path / "other")
    loaded = load_finished(found)
    prompts = {("m", str(n), 0): list(range(5, 5 + n)) for n in (14, 6, 1)}
    together = generated(loaded, prompts, 6, 0.0, AnswerOptions())
    for (key, prompt), answer in zip(prompts.items(), together, strict=True):
        assert generated(loaded, {key: prompt}, 6, 0.0, AnswerOptions()) == [answer]


# ---------------------------------------------------------------------------------------------- the vocabulary


def with_token(tiny, directory, *, special: bool):
    """The tiny model with a token more in its tokenizer; return the directory and the token's id."""
    shutil.copytree(tiny.model, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=special)
    tokenizer.save_pretrained(directory)
    return directory, len(tokenizer) - 1


def options(tiny, model, text=""):
    """The options of a run of a model on the tiny rows; the last of them says a text."""
    rows = tiny.train.read_text().splitlines()
    rows.append(json.dumps(json.loads(rows[0]) | {"instruction": f"Say {text}", "id": "last"}))
    tiny.train.write_text("\n".join(rows))
    return replace(tiny, model=model).bare


@pytest.mark.slow
def test_a_spare_token_is_no_obstacle(tiny, tmp_path):
    """As `<image_soft_token>` of the text-only Gemma 3; a row that spells it has text, as with all special tokens."""
    model, _ = with_token(tiny, tmp_path / "other", special=True)
    words = options(tiny, model, "<image_soft_token>")
    for command in (["preview"], ["run", *SHORT, "--objective", "NTP", "--out", "run"]):
        done = in_this_process(*command, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (found,) = finished_models(tmp_path / "run")
    assert load_finished(found).render([{"role": "user", "content": "Look: <image_soft_token>"}])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("command", [["preview"], ["run", "--out", "run"]], ids=["preview", "run"])
def test_a_row_that_makes_it_is_refused_before_weights_are_read(command, special, tiny, tmp_path):
    model, number = with_token(tiny, tmp_path / "other", special=special)
    (model / "model.safetensors").write_bytes(b"")
    words = options(tiny, model, "<image_soft_token>")
    words += ["--data.special_tokens", "tokens"] if special else []
    done = in_this_process(*command, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert f"the token '<image_soft_token>' has id {number}, the model embeddings for {number} ids" in done.stderr


def test_a_padding_without_an_embedding_is_refused(tiny, tmp_path):
    model, number = with_token(tiny, tmp_path / "other", special=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "<image_soft_token>"
    tokenizer.save_pretrained(model)
    done = in_this_process("preview", *options(tiny, model), cwd=tmp_path)
    assert done.returncode == 2
    assert f"has id {number}" in done.stderr
    (found,) = finished_models(model)
    with pytest.raises(ConfigError, match=f"has id {number}"):
        load_finished(found)


def test_a_prompt_that_makes_it_is_refused(tiny, tmp_path):
    model, number = with_token(tiny, tmp_path / "other", special=False)
    (found,) = finished_models(model)
    loaded = load_finished(found)
    loaded.render([{"role": "user", "content": "Look."}])
    with pytest.raises(ConfigError, match=f"^model {model}: the token '<image_soft_token>' has id {number}"):
        loaded.render([{"role": "user", "content": "Look: <image_soft_token>"}])


@pytest.mark.parametrize("reference", ["WeakerModel", "FromCheckpoints"])
def test_a_reference_with_fewer_embeddings_is_refused(reference, tiny, tmp_path):
    """It has the target's tokenizer, so it reads the target's rows."""
    target = shutil.copytree(tiny.model, tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(["<new>"])
    config = transformers.LlamaConfig(**TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 128})
    random_model(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    weaker = shutil.copytree(tiny.model, tmp_path / "weaker")
    tokenizer.save_pretrained(weaker)
    chosen = {
        "WeakerModel": ["--reference.model.path", str(weaker)],
        "FromCheckpoints": ["--reference", "FromCheckpoints", "--reference.paths", f"[{target}, {weaker}]"],
    }
    words = [*options(tiny, target, "<new>"), *SHORT]
    done = in_this_process("run", *words, *chosen[reference], "--out", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"the token '<new>' has id {len(tokenizer) - 1}" in done.stderr
