"""Documents in one row: a probe of whether a model keeps them apart, and answers to what transformers asks of rows.

transformers builds block-diagonal causal masks from position ids that start again, if it gets no attention mask and
builds masks for this attention at all. Flash attention gets the places where positions start again, in a batch of one
row. Each architecture uses these in its own way, so a probe is compared with its documents one at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, masking_utils

from sftmix.model.compared import apart, longest_window, probe_ids, probing
from sftmix.model.varlen import DEVICES, VARLEN, missing, unfit
from sftmix.words.errors import ConfigError

_REMEDY = (
    "Set another model.attention (sdpa, eager) or none, or training.padding_free to false (micro-batches are padded); "
    "of plain text data.packing to false (each example is a piece of one document)."
)


def is_skipping(attention: str | None, device: torch.device) -> bool:
    """Return True if this attention does no work between documents on this device; None: the one chosen there.

    It then has no dense mask over all token pairs. flex_attention does not count: it makes its mask anew, and compiles
    for it, wherever lengths differ.
    """
    return device.type in DEVICES if attention in (None, VARLEN) else is_flash(attention) and device.type != "cpu"


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation that text goes through."""
    return model.get_decoder().config._attn_implementation


@contextmanager
def attending(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Compute attention by another implementation."""
    config = model.get_decoder().config
    own = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = own


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Leave out cuDNN's attention unless it is allowed: it plans anew for each (batch, length), 160 ms on an H200."""
    cuda = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(before and allowed)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)


def is_flash(attention: str | None) -> bool:
    """Return True for flash attention, by any of its names: flash_attention_2, kernels-community/flash-attn2, ..."""
    return "flash" in (attention or "")


@contextmanager
def known_rows(*, packed: bool) -> Iterator[None]:
    """Answer what transformers asks of the rows of a pass: do they hold several documents, and is a mask without zeros?

    It would read positions and mask where they are, and so wait for the device in each pass. Both are known where rows
    are put together; every mask counts as one of padded rows. A version that asks otherwise reads them itself.
    """
    answers = {
        # [[0, 1, 0, 1, 2]] -> [[1, 1, 2, 2, 2]]: transformers compares these numbers for equality alone
        "find_packed_sequence_indices": lambda positions: (positions == 0).cumsum(-1) if packed else None,
        "fast_all": lambda mask: False,
    }
    functions = vars(masking_utils)  # its other functions look these names up in the module at each call
    own = {name: functions[name] for name in answers.keys() & functions.keys()}
    functions.update({name: answers[name] for name in own})
    try:
        yield
    finally:
        functions.update(own)


def check_attention(model: PreTrainedModel, device: torch.device, *, trains: bool) -> None:
    """Raise ConfigError if the attention implementation does not exist on the device, or has no gradient there."""
    name = model.config._attn_implementation
    if device.type == "cpu" and (is_flash(name) or (trains and name == "flex_attention")):
        raise ConfigError(
            f"model.attention {name} does not {'train' if trains else 'run'} on a CPU; use sdpa or eager there"
        )


def packing_problem(model: PreTrainedModel, *, padding_free: bool = False) -> str | None:
    """Return a message if packed documents have other hidden states than each document alone; None if not.

    Attention varlen is compared with the eager one, as it must also be what the model means by attention.

    padding_free  probe a single row; else several lines of packed documents and padding

    The problem is returned, not raised, so that the forward around the probe ends normally: after an error, FSDP keeps
    its parameters gathered. Raises ConfigError if the backbone itself fails.
    """
    attention = attention_of(model)
    varlen = attention == VARLEN
    name = f"{type(model).__name__} ({model.config.model_type}, attention {attention})"
    decoder, device = model.get_decoder(), model.device
    window = longest_window(model)
    # Three lines of 16 tokens and a window, as padding is also a document; padding-free, one line of all. The window is
    # in the last documents, which so see a whole one, though it begins in those before.
    lengths = [7, 4, 5 + window, 6, 10 + window, 9, 7 + window]
    ids = probe_ids(model, sum(lengths)).view(1 if padding_free else 3, -1)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).view(ids.shape)
    places: dict[str, Any] = {}
    if varlen:
        if problem := unfit(decoder.config):
            return f"model.path: {name} has {problem}, which attention {VARLEN} cannot compute. {_REMEDY}"
        if problem := missing(device) if device.type == "cuda" else None:
            return f"model.attention {VARLEN} does not run on this GPU: {problem}. {_REMEDY}"
        starts = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)  # 0, 7, 11, 16, ..., 48
        places = {"cu_seq_lens_q": starts, "max_length_q": max(lengths)}
    with probing(model, f"{name} does not take packed documents", _REMEDY):
        out = decoder(input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False, **places)
        packed = out.last_hidden_state
        with attending(model, "eager" if varlen else attention):
            singles = ids.view(1, -1).split(lengths, dim=1)
            alone = [decoder(input_ids=one, use_cache=False).last_hidden_state[0] for one in singles]
    # Under autocast the states may be float32 still, but were computed in less.
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else packed.dtype
    if varlen and device.type == "cuda" and precision.itemsize > 2:
        return f"model.path: attention {VARLEN} computes in half precision, and {name} in {precision}. {_REMEDY}"
    if varlen and precision == torch.float64:
        precision = torch.float32  # as eager attention has
    if difference := apart(packed.flatten(0, 1), torch.cat(alone), precision):
        return (
            f"model.path: {name} does not keep packed documents apart: their hidden states differ {difference} from "
            f"those of each document alone. {_REMEDY}"
        )
    return None
