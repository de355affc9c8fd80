"""Runs with adapters through the real command line: small checkpoints, what is refused, and both exports. QLoRA where
bitsandbytes is installed: the base is quantised, the adapters are float32."""

import contextlib
import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sftmix.model.adapters import add_adapters, quantization_config
from sftmix.model.compared import say_once
from sftmix.model.head import check_head
from sftmix.model.load import load_model
from sftmix.options import LoraOptions
from tests.tiny import SHORT, metrics

pytestmark = [  # of PEFT when it reads what was written; ours are silent about both
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

LORA = ("--model.lora.r", "4", "--model.lora.target_modules", "[q_proj, down_proj, lm_head]")
ONE = ("--training.max_steps", "4", "--checkpoint.every", "2")


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory, finished):
    """A whole run with adapters, the head among them, on the tiny model, whose head is tied."""
    out = tmp_path_factory.mktemp("lora") / "run"
    from sftmix.cli import main

    words = ["run", *finished.tiny.options, *ONE]
    say_once.cache_clear()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([*words, *LORA, "--with_baseline", "--out", str(out)]) == 0
    (out.parent / "said").write_text(said.getvalue())
    return out, finished.tiny, words


def logits(path: Path | str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_the_run_holds_adapters_only(adapted_run):
    out, tiny, _ = adapted_run
    whole = sum(x.numel() for x in load_file(tiny.model / "model.safetensors").values())
    for stage in ("train", "baseline"):
        written = load_file(out / stage / "model" / "adapter_model.safetensors")
        numbers = sum(x.numel() for x in written.values())
        assert numbers < whole / 3
        assert any("lm_head" in name for name in written)
        stored = [x for f in (out / stage / "checkpoints").rglob("*.safetensors") for x in load_file(f).values()]
        steps = len(list((out / stage / "checkpoints").iterdir()))
        assert sum(x.numel() for x in stored if x.numel() > 1) == 3 * numbers * steps
    assert AutoTokenizer.from_pretrained(out / "train" / "model").chat_template


def test_a_line_says_where_the_adapters_are_and_none_that_others_leave_some_out(adapted_run):
    """Of a layer q has 32 x 32 of 32 x (32 + 16 + 16 + 32) numbers, and down one third of the MLP's."""
    said = [line for line in (adapted_run[0].parent / "said").read_text().splitlines() if "adapters" in line]
    assert said == ["model.lora: adapters on, of the decoder's weights by kind: attention 33.3%, dense 33.3%"]


def test_adapters_that_peft_cannot_write_are_refused_before_they_are_trained(tiny, sftmix, tmp_path, monkeypatch):
    """PEFT before 0.21 leaves the biases of `bias: lora_only` out of its format."""
    config = AutoConfig.from_pretrained(tiny.model)
    config.attention_bias = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tiny.model)
    own = peft.get_peft_model_state_dict

    def as_before(*given, **options):
        return {name: x for name, x in own(*given, **options).items() if not name.endswith(".bias")}

    monkeypatch.setattr(peft, "get_peft_model_state_dict", as_before)
    words = ["run", *tiny.options, *SHORT, "--model.lora.r", "2", "--model.lora.bias", "lora_only"]
    ended = sftmix(*words, "--objective", "NTP", "--out", str(tmp_path / "run"))
    assert (ended.code, "bias to none or all, or install peft 0.21" in ended.err) == (2, True), ended.err
    assert not (tmp_path / "run/train/metrics.jsonl").exists()


def test_both_exports(adapted_run, sftmix, tmp_path):
    out, tiny, _ = adapted_run
    expected, adapters, merged = logits(out / "train" / "model"), tmp_path / "adapters", tmp_path / "merged"
    assert float((expected - logits(tiny.model)).abs().max()) > 1e-3
    assert sftmix("export", str(out), "--to", str(adapters)).code == 0
    assert sftmix("export", str(out), "--to", str(merged), "--merge").code == 0
    assert torch.equal(logits(adapters), expected)
    assert float((logits(merged) - expected).abs().max()) < 1e-5
    assert not list(merged.glob("adapter*"))


@pytest.mark.slow
def test_without_checkpoints_the_exported_adapters_are_merged(adapted_run, made, sftmix, tmp_path):
    none = made(*adapted_run[2], "--checkpoint.every", "0", *LORA)
    assert not (none / "train" / "checkpoints").exists()
    merged = tmp_path / "merged"
    done = sftmix("export", str(none), "--to", str(merged), "--merge")
    assert done.code == 0, done.err
    assert float((logits(merged) - logits(none / "train" / "model")).abs().max()) < 1e-5
    refused = sftmix("export", str(none), "--to", str(tmp_path / "adapters"))
    assert refused.code == 2
    assert f"has no checkpoint; {none / 'train' / 'model'} holds the model after the last step" in refused.err


@pytest.mark.long
@pytest.mark.slow
def test_a_base_kept_in_bfloat16_makes_the_adapters_and_the_merged_model_of_one_in_float32(
    tiny, made, sftmix, tmp_path
):
    """Of the same values; with scores of the reference, a split by them, and the base model's own losses."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        place, merged = tmp_path / str(dtype), tmp_path / f"merged-{dtype}"
        shutil.copytree(tiny.model, place)
        load_model(tiny.model).bfloat16().to(dtype).save_pretrained(place)
        words = [str(place) if word == str(tiny.model) else word for word in tiny.options]
        out = made("run", *words, *ONE, "--training.precision", "bf16", "--model.lora.r", "4", out=f"run-{dtype}")
        done = sftmix("export", str(out), "--to", str(merged), "--merge", "--dtype", "float32")
        assert done.code == 0, done.err
        losses = [line["loss"] for stage in ("reference", "train") for line in metrics(out, stage)]
        figures = json.loads((out / "base" / "figures.json").read_text())["eval_nll"]
        files = [
            load_file(out / "train" / "model" / "adapter_model.safetensors"),
            load_file(merged / "model.safetensors"),
        ]
        found.append((losses, figures, *files))
    (*figures, adapters, whole), (*others, other_adapters, other_whole) = found
    assert figures == others
    for mine, theirs in ((adapters, other_adapters), (whole, other_whole)):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# ------------------------------------------------------------------------------------------------------ QLoRA

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
QLORA = LoraOptions(r=4, quantize="4bit")


@needs_bitsandbytes
def test_the_base_is_quantised_and_the_adapters_are_not(tiny):
    model = load_model(tiny.model, quantization=quantization_config(QLORA, compute=torch.float32))
    add_adapters(model, QLORA, seed=0)
    check_head(model)
    q_proj = model.model.layers[0].self_attn.q_proj
    assert q_proj.base_layer.weight.dtype == torch.uint8
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == torch.float32


@needs_bitsandbytes
def test_a_run_and_its_merged_model(tiny, made, sftmix, tmp_path):
    """Merged are the base's own weights: the adapters are exactly what the adapter directory adds to them."""
    words = ["--model.lora.r", "4", "--model.lora.quantize", "4bit", "--training.max_steps", "3"]
    out, merged = made("run", *tiny.options, *words, "--objective", "NTP"), tmp_path / "merged"
    written = load_file(out / "train" / "model" / "adapter_model.safetensors")
    assert all(x.dtype == torch.float32 for x in written.values())
    assert max(float(x.abs().max()) for k, x in written.items() if "lora_B" in k) > 0
    assert sftmix("export", str(out), "--to", str(merged), "--merge").code == 0
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        left, right = (
            AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval()(ids).logits
            for p in (merged, out / "train" / "model")
        )
    assert float((left - right).abs().max()) < 1e-5
