"""Attention within documents that lie one after the other, by torch's own `varlen_attn`: no mask, no other package.

transformers knows it as model.attention varlen. On CUDA it is flash attention in half precision. Elsewhere sdpa with a
mask stands in for the kernel, so that all else is the same on a CPU. For torch.compile neither breaks a graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VARLEN = "varlen"
DEVICES = ("cuda",)
"""Kinds of devices that have the kernel."""
WIDEST = 256
"""Largest width of a head, of which the kernel takes multiples of 8."""

_NO_MATTER = {"position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "cache_position", "return_dict"}
_NO_MATTER |= {"output_attentions", "output_hidden_states", "output_router_logits", "deterministic"}
"""What models hand to their attention beside its own arguments, and what does not change its result. Anything else,
such as a soft cap, sinks or a bias by position, would."""

_notes: dict[str | int, str] | None = None


@contextmanager
def noting() -> Iterator[dict[str | int, str]]:
    """Yield what the kernel cannot compute of the passes in this block, in place of errors: FSDP survives none."""
    global _notes
    _notes = {}
    try:
        yield _notes
    finally:
        _notes = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention of each token to the tokens up to itself in its document, [b, l, heads, D], and None.

    query, key, value  [b, heads, l, D]; keys and values may have fewer heads
    attention_mask     None, or the mask of rows padded on the left or of a cache, which sdpa takes: neither trains
    cu_seq_lens_q      i32[documents + 1], the places where documents begin in the b * l tokens, and the end; None: each
                       line is a document. Positions are not read: a caller with several documents in a line gives these
    max_length_q       at least the length of the longest document
    Raises ValueError for what the kernel cannot compute.
    """
    lines, _, length, _ = query.shape
    # Under autocast, rotary embeddings in float32 make queries and keys float32, which the kernel does not have.
    device, kind = query.device.type, value.dtype
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    unknown = {name for name, x in others.items() if x is not None and x is not False} - _NO_MATTER
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    widths = {x.shape[-1] for x in (query, key, value)}
    problem = _problem(unknown, dropout, causal, widths, kind if query.is_cuda else torch.bfloat16)
    if _notes is not None:
        _notes.pop(sliding_window or 0, None)
        _notes.update({problem: problem} if problem else {})
    elif problem:
        raise ValueError(f"model.attention {VARLEN} cannot compute {problem}; use sdpa or eager")
    if problem or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(kind) for x in (query, key, value))
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(lines + 1, dtype=torch.int32, device=query.device) * length
        max_length_q = length
    attention = _kernel if query.is_cuda else _stand_in
    return attention(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window).unflatten(0, (lines, length)), None


def _problem(unknown: set[str], dropout: float, causal: bool, widths: set[int], kind: torch.dtype) -> str | None:
    """Return what the kernel does not have; None if it has all that an attention asks for."""
    if unknown:
        return f"an attention with {', '.join(sorted(unknown))}"
    if dropout:
        return f"an attention dropout of {dropout:g}"
    if not causal:
        return "an attention that sees later tokens"
    if len(widths) > 1 or max(widths) > WIDEST or max(widths) % 8:
        return f"heads of width {sorted(widths)} (allowed: a single multiple of 8, at most {WIDEST})"
    return None if kind.itemsize == 2 else f"numbers in {kind} (allowed: half precision)"


def _mask(**given: Any) -> Tensor | None:
    """Return None, unless tokens are left out or cached: nothing dense is built."""
    if _notes is not None and (window := given.get("local_size")):  # some hand it to their masks alone
        _notes[window] = f"masks with a window of {window} that the attention does not get"
    if given["attention_mask"] is None and given["q_length"] == given["kv_length"]:
        return None
    return sdpa_mask(**given | {"allow_is_causal_skip": False})


AttentionInterface.register(VARLEN, attend)
AttentionMaskInterface.register(VARLEN, _mask)


# q [T, heads, D], k and v [T, heads of keys, D], starts i32[documents + 1] -> [T, heads, D]


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    more: Any = (
        {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    )  # torch 2.11 needs no word
    sides = (-1 if window is None else window - 1, 0)  # how far a token sees before and after itself
    return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=sides, **more)


def _stand_in(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    at = torch.arange(len(q), device=q.device)
    document, back = torch.bucketize(at, starts, right=True), at[:, None] - at
    seen = (document[:, None] == document) & (back >= 0) & (back < (longest if window is None else window))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
