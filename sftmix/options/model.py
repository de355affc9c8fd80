"""The model to fine-tune, and its adapters."""

from dataclasses import dataclass, field
from typing import Literal

from sftmix.words.given import OptionFields


@dataclass(kw_only=True)
class LoraOptions(OptionFields):
    """Low-rank adapters by PEFT, under PEFT's names: weight + scaling B A, where only A and B are trained."""

    r: int | None = None
    """Rank of the adapters; null or 0: none, all weights are trained. The other options need it."""
    lora_alpha: int = 16
    """Numerator of scaling = lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of A while training, in [0, 1)."""
    target_modules: list[str] | str = "all-linear"
    """Modules that get an adapter: all-linear (all but the head), a regular expression for whole names, or a list of
    names, which may hold lm_head, embed_tokens and all-linear."""
    modules_to_save: list[str] | None = None
    """Modules trained and saved in full beside the adapters, by name."""
    use_dora: bool = False
    """DoRA: the adapter turns the direction of each weight, a trained vector is its magnitude."""
    use_rslora: bool = False
    """Rank-stabilised: scaling = lora_alpha / sqrt(r)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are also trained: none, all of the model, or only in the modules with an adapter."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """true: A uniform, B zero; gaussian: A normal, B zero; orthogonal: both, with A B = 0; false: both random."""
    quantize: Literal["4bit"] | None = None
    """4bit: QLoRA, the frozen weights as NF4 by bitsandbytes; with training.parallel ddp or one process."""

    def without_adapters(self) -> "LoraOptions":
        """Return the options for the base model under the adapters, which is stored without them."""
        return LoraOptions(quantize=self.quantize)


@dataclass(kw_only=True)
class ModelOptions(OptionFields):
    path: str = ""
    """Hugging Face hub id or directory of the base model to fine-tune."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the exported weights; auto: the dtype in the base model's config, or float32 if it names none;
    for adapters float32. Training keeps float32 weights."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Train low-rank adapters instead of all weights."""
    attention: str | None = None
    """Attention implementation handed to transformers (varlen, sdpa, eager, flash_attention_2, flex_attention); null:
    varlen on CUDA for models that it fits (training.padding_free), else its default. flex_attention trains on a GPU
    only."""
