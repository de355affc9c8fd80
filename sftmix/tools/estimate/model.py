"""A model without weights: its numbers, the FLOPs of its passes, and what its forward keeps.

FLOPs are multiplications and additions of matrices. A matrix takes 2 per number and token in the forward and 4 in the
backward (2 if it is frozen). The head is multiplied with response tokens alone. Mixup adds no matrix product.
"""

import torch
from torch import nn

from sftmix.model.adapters import add_adapters
from sftmix.model.layers import keep_in_bfloat16
from sftmix.model.load import stored_dtype
from sftmix.model.mapped import empty_model
from sftmix.options.model import LoraOptions
from sftmix.training.numbers import Count, Numbers
from sftmix.types import Float64
from sftmix.words.errors import ConfigError

QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a 4-bit layer: 4 bits, an 8-bit scale per 64 numbers, a float32 scale per 256 of those scales."""

MEASURE = (
    "Measure instead: run with --training.max_steps 2 --checkpoint.every 0, and see peak_memory_bytes and elapsed in "
    "its summary.json"
)


def refuse_experts(path: str, model: nn.Module) -> None:
    """Raise ConfigError for a model with experts, by the name that transformers gives them in every family."""
    for part in model.modules():
        if "Experts" in type(part).__name__:  # MixtralExperts, Qwen3MoeExperts
            raise ConfigError(
                f"model.path: {path} routes tokens to experts ({type(part).__name__}), and estimate would count all of "
                f"them for each token. {MEASURE}"
            )


class FakeModel:
    """A causal language model without weights, of which only the config is read.

    precision      in which it computes, fp32 or bf16
    shards         parts of the weights, each on another rank; 1: each rank holds all
    numbers        of its parameters
    per_token      numbers of the backbone's matrices; embeddings are looked up, not multiplied with
    stored_bytes   bytes of the weights: float32; of a frozen base bfloat16 or 4 bits
    read_bytes     bytes while its files are read on a CPU: float32, and half precision as it is mapped; 0: 4 bits
    attention_width  numbers of all heads of a layer; 0 for a model without attention
    """

    def __init__(
        self,
        path: str,
        attention: str | None,
        lora: LoraOptions,
        *,
        precision: str = "fp32",
        shards: int = 1,
        trains: bool = True,
    ) -> None:
        """Arguments as model.path, model.attention and model.lora.

        Raises ConfigError for a model that cannot be built, and for one with experts.
        """
        # Flash attention wants its package and a GPU: sdpa is followed in its place. eager keeps its [B, heads, L, L].
        known = attention if attention in (None, "eager") else "sdpa"
        self.path, self.lora = path, lora
        self.precision, self.shards = precision, shards
        try:
            self.model = model = empty_model(path, attention=known)
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"model.path: cannot build the model of {path}: {error}") from error
        refuse_experts(path, model)
        if lora.r:
            add_adapters(model, lora, seed=0)
        elif lora.quantize:  # nothing is trained, and all of it is in 4 bits
            model.requires_grad_(False)
        stored = stored_dtype(path)
        if precision == "bf16" and (lora.r or not trains) and stored == torch.bfloat16:
            keep_in_bfloat16(model, trains=bool(lora.r))
        self.numbers = Numbers(model)
        self.read_bytes = 0 if lora.quantize else self.numbers.whole.all * (4 + 2 * (stored != torch.float32))
        self.stored_bytes: float = sum(one.nbytes for one in model.parameters())
        if lora.quantize:
            self._quantize()
        decoder, config = model.get_decoder(), model.config.get_text_config()
        # The Llama of `quickstart`: 2 (2 128² + 2 64 128 + 3 384 128) = 393,216 of its 575,104 numbers.
        looked_up = {one.weight for one in decoder.modules() if isinstance(one, nn.Embedding)}
        self.per_token = Count(p for p in decoder.parameters() if p.dim() > 1 and p not in looked_up)
        heads = getattr(config, "num_attention_heads", 0)
        # Heads of queries: several may share their keys and values, but each is multiplied.
        self.attention_width = heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)

    def _quantize(self) -> None:
        """Count frozen linear layers, but not the head, as bitsandbytes stores and computes them."""
        for layer in self.model.modules():
            frozen = isinstance(layer, nn.Linear) and not layer.weight.requires_grad
            if isinstance(layer, nn.Linear) and frozen and layer.weight is not self.numbers.head:
                self.stored_bytes += QUANTIZED_BYTES * layer.weight.numel() - layer.weight.nbytes
                # As bitsandbytes does, whose layers return the dtype of their input.
                layer.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))
                if self.precision == "bf16":
                    layer.bfloat16()


def forward_flops(model: FakeModel, amount: Float64) -> tuple[float, float, float]:
    """FLOPs of the backbone's matrices, of attention, and of the head; the amount is from `amount_of`.

    Attention is the product for the scores and the one with the values: 2 FLOPs each per number of a head and pair of
    positions, of which the causal mask leaves half.
    """
    tokens, targets, squares = amount.tolist()  # T, response tokens, sum of L²
    attention = 2.0 * model.attention_width * model.numbers.n_layers * squares  # 2 products x 2 FLOPs / 2 for the mask
    return 2.0 * model.per_token.all * tokens, attention, 2.0 * model.numbers.head.numel() * targets


def training_flops(model: FakeModel, amount: Float64, *, recompute: bool) -> float:
    """Forward and backward; recompute (activation checkpointing): the forward of the backbone counts twice."""
    matrices, attention, head = forward_flops(model, amount)
    # Gradients of what goes in: as the forward; of attention, whose products have two such factors, twice it.
    inputs = matrices + 2 * attention + head
    # A frozen matrix has no gradient of its own.
    weights = 2.0 * model.per_token.trained * amount[0] + head * model.numbers.head.requires_grad
    return (matrices + attention) * (1 + recompute) + head + inputs + weights
