"""FLOPs of one stage.

They count multiplications and additions of matrices: 2 per number and token forward, twice that backward (once where
the matrix is frozen), attention as causal, the head on response tokens only. Mixup adds no matrix product.
"""

from __future__ import annotations

from sftmix.estimate.model import FakeModel
from sftmix.estimate.work import Tokens


def forward_flops(model: FakeModel, tokens: Tokens) -> float:
    """Of a forward pass over the tokens."""
    vocabulary, width = model.head_shape
    return 2.0 * (model.per_token() * tokens.all + vocabulary * width * tokens.targets) + _attention(model, tokens)


def training_flops(model: FakeModel, tokens: Tokens, *, recompute: bool) -> float:
    """Of forward and backward; with activation checkpointing the backbone's forward counts twice."""
    vocabulary, width = model.head_shape
    backbone = 2.0 * model.per_token() * tokens.all + _attention(model, tokens)
    head = 2.0 * vocabulary * width * tokens.targets
    weights = 2.0 * model.per_token(trained=True) * tokens.all + head * model.head_is_trained
    inputs = backbone + _attention(model, tokens) + head
    return backbone * (2 if recompute else 1) + head + inputs + weights


def _attention(model: FakeModel, tokens: Tokens) -> float:
    """Scores and values, each 2 FLOPs per head number and pair of positions, of which a causal mask leaves half."""
    return 2.0 * model.attention_width * len(model.layers) * tokens.squares
