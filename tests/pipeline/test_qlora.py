"""QLoRA where bitsandbytes is installed: the base is quantised, the adapters are float32, and both exports work."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sftmix.model.adapters import add_adapters, quantization_config
from sftmix.model.head import check_head
from sftmix.model.load import load_model
from sftmix.options import LoraOptions

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

QLORA = LoraOptions(r=4, quantize="4bit")


def test_the_base_is_quantised_and_the_adapters_are_not(tiny):
    model = load_model(tiny.model, quantization=quantization_config(QLORA, compute=torch.float32))
    add_adapters(model, QLORA, seed=0)
    check_head(model)
    q_proj = model.model.layers[0].self_attn.q_proj
    assert q_proj.base_layer.weight.dtype == torch.uint8
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == torch.float32


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
