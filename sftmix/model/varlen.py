"""Attention within documents that lie one after the other, by torch's own `varlen_attn`: no mask, no other package.

transformers knows it as model.attention varlen. On CUDA it is flash attention in half precision. Elsewhere sdpa with a
mask stands in for the kernel, so that all else is the same on a CPU. For torch.compile neither breaks a graph.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VARLEN = "varlen"
DEVICES = ("cuda",)
"""Kinds of devices that have the kernel."""
FAMILIES = """apertus arcee cohere cohere2 ernie4_5 exaone4 gemma gemma3_text glm glm4 gpt_neox granite granitemoe
helium hunyuan_v1_dense llama ministral mistral mixtral olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen3 qwen3_moe
smollm3 starcoder2"""
"""Model types with an attention that the kernel has: causal, scaled, at most with a window (docs/limits.md)."""
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
"""What says that heads of queries share keys; the kernel of torch 2.11 finds it by itself."""
WIDEST = 256
"""Largest width of a head, of which the kernel takes multiples of 8."""


def unfit(config: PretrainedConfig) -> str | None:
    """Return what the kernel does not have of the attention that a decoder's config describes; None if it has all."""
    if cap := getattr(config, "attn_logit_softcapping", None):  # Gemma 2: 50
        return f"a soft cap of {cap:g} in its attention"
    if config.model_type not in FAMILIES.split():
        return f"the type {config.model_type}"
    if dropout := getattr(config, "attention_dropout", None):
        return f"an attention dropout of {dropout:g}"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width > WIDEST or width % 8:
        return f"heads of width {width} (allowed: a multiple of 8, at most {WIDEST})"
    return None


def missing(device: torch.device) -> str | None:
    """Return why the kernel does not run on a device, as torch has it for some generations of GPUs; None if it does."""
    one = torch.zeros(2, 1, 8, dtype=torch.bfloat16, device=device)
    try:
        _kernel(one, one, one, torch.tensor([0, 2], dtype=torch.int32, device=device), 2, None, None)
    except RuntimeError as error:  # "CUDA error: no kernel image is available for execution on the device"
        return str(error).strip().partition("\n")[0]
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
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
    others             what models hand to any attention, and what changes nothing in those of FAMILIES
    """
    if attention_mask is not None:  # it has the window as well
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    lines, _, length, _ = query.shape
    # Under autocast, rotary embeddings in float32 make queries and keys float32, which the kernel does not have.
    device, kind = query.device.type, value.dtype
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(kind) for x in (query, key, value))  # [b * l, heads, D]
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(lines + 1, dtype=torch.int32, device=query.device) * length  # 0, l, 2 l, ...
        max_length_q = length
    attention = _kernel if query.is_cuda and kind.itemsize == 2 else _stand_in
    return attention(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window).unflatten(0, (lines, length)), None


def _mask(**given: Any) -> Tensor | None:
    """Return None, unless tokens are left out or cached: nothing dense is built."""
    if given["attention_mask"] is None and given["q_length"] == given["kv_length"]:
        return None
    return sdpa_mask(**given | {"allow_is_causal_skip": False})  # for `attend`, None would mean that there is no mask


AttentionInterface.register(VARLEN, attend)
AttentionMaskInterface.register(VARLEN, _mask)


# q [T, heads, D], k and v [T, heads of keys, D], starts i32[documents + 1] -> [T, heads, D]


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Any:
    sides = (-1 if window is None else window - 1, 0)  # how far a token sees before and after itself
    about: Any = {"scale": scale, "window_size": sides, **GROUPED}
    return varlen.varlen_attn(q, k, v, starts, starts, longest, longest, **about)


def _stand_in(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    at = torch.arange(len(q), device=q.device)
    document, back = torch.bucketize(at, starts, right=True), at[:, None] - at  # starts 0, 2, 5: documents 1 1 2 2 2
    seen = (document[:, None] == document) & (back >= 0) & (back < (longest if window is None else window))  # [T, T]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
