"""The sizes of a fake model against the real one: its numbers, and what autograd keeps in each precision."""

import pytest
from transformers import GPT2Config, MambaConfig

from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions
from sftmix.tools.estimate.model import QUANTIZED_BYTES, FakeModel
from tests.tools.estimate.configs import LAYERS, VOCABULARY, WIDTH, segment, small_llama

NO_LORA, LORA, QLORA = LoraOptions(), LoraOptions(r=4), LoraOptions(r=4, quantize="4bit")
FULL, MIXED = [segment(4, 64)], [segment(2, 48), segment(1, 64), segment(2, 20, "padded")]
PACKED = [segment(1, 96, "packed")]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"), num_key_value_heads=2)


def test_numbers_are_those_of_the_real_model(path, tmp_path):
    real, fake = load_model(path), FakeModel(path, None, NO_LORA)
    assert fake.numbers == (sum(p.numel() for p in real.parameters()),) * 2
    assert fake.head_shape == tuple(real.get_output_embeddings().weight.shape)
    assert fake.per_token.all == sum(p.numel() for x in real.model.layers for p in x.parameters() if p.dim() == 2)
    adapted = FakeModel(path, None, LoraOptions(r=4, target_modules=["q_proj"]))
    assert adapted.numbers.trained == LAYERS * 2 * 4 * WIDTH
    assert adapted.numbers.all == fake.numbers.all + adapted.numbers.trained
    assert not adapted.head_is_trained
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=512).save_pretrained(tmp_path / "gpt2")
    gpt2 = FakeModel(tmp_path / "gpt2", None, NO_LORA)
    assert gpt2.per_token.all == 2 * 12 * 16 * 16  # 512 learned positions are looked up, not multiplied with
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50}
    MambaConfig(**sizes, architectures=["MambaForCausalLM"]).save_pretrained(tmp_path / "mamba")
    mamba = FakeModel(tmp_path / "mamba", None, NO_LORA)
    assert (mamba.attention_width, mamba.n_layers) == (0, 2)  # and not 4: each block has a mixer, which is none


def test_four_bit_layers_are_counted_as_bitsandbytes_stores_them(path):
    """Embeddings, head, norms and adapters stay float32 (bitsandbytes leaves them, load_model loads them so)."""
    real, fake = load_model(path), FakeModel(path, "sdpa", QLORA)
    add_adapters(real, LORA, seed=0)
    in_4_bits = sum(p.numel() for p in real.model.layers.parameters() if p.dim() == 2 and not p.requires_grad)
    others = sum(p.numel() for p in real.parameters()) - in_4_bits
    assert others > 2 * VOCABULARY * WIDTH
    assert fake.stored_bytes == 4 * others + QUANTIZED_BYTES * in_4_bits
    read = FakeModel(path, "sdpa", QLORA.without_adapters())
    assert read.stored_bytes == fake.stored_bytes - 4 * fake.numbers.trained
