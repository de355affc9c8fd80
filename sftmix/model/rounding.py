"""From float32 weights to the weights of an export in half precision.

The steps of a training are smaller than the gaps between the numbers of bfloat16: at a learning rate of 2e-6, rounding
to nearest undoes most of them. Stochastic rounding takes one of the two neighbours of a value, the nearer one more
often: a share s of the gap above the lower one goes up with probability s. So each weight is kept on average, and with
it the sums over many weights that a layer computes. A value that the dtype has stays, as in a weight that was not
trained.

The draws are a function of (seed, name of the tensor, place in the whole tensor), so all shards, ranks and devices give
the same bits.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from sftmix.ranks.rng import generator
from sftmix.words.errors import ConfigError

BLOCK = 2**16
"""Places of a tensor that share a generator; they are rounded together, which bounds the memory."""


def stochastically_rounded(x: Tensor, dtype: torch.dtype, *, seed: int, name: str, start: int = 0) -> Tensor:
    """Return `x`, float32 or float64 of any shape, in `dtype`; to bfloat16 and float16 by stochastic rounding.

    A value beyond the largest finite one becomes what rounding to nearest makes of it; infinities and NaN stay.

    start  if `x` is a part of a tensor: the place of its first element in the whole, in flat order
    """
    if dtype.itemsize > 2:
        return x.to(dtype)
    flat, parts = x.reshape(-1), [x.new_empty(0, dtype=dtype)]
    # 100 numbers from place 65,500 on: 36 of the block that begins at 0, and 64 of the one at 65,536
    for first in range(start // BLOCK * BLOCK, start + len(flat), BLOCK):
        part = flat[max(first - start, 0) : first - start + BLOCK]
        draws = generator(seed, "rounding", name, first).random(BLOCK)[max(start - first, 0) :]
        nearest = part.to(dtype)
        error = part - nearest
        # The next number on the other side of the value: as integers, numbers of one sign are ordered by their size.
        # 1.0039 in bfloat16: nearest 1, other 1.0078, share 0.499. -1.0039: -1 and -1.0078.
        other = (nearest.view(torch.int16) + (error.sign() * part.sign()).short()).view(dtype)
        share = error / (other.to(x.dtype) - nearest)  # exact; 0 if the other is infinite, NaN if there is no error
        parts.append(torch.where(share > torch.from_numpy(draws[: len(part)]).to(x.device), other, nearest))
    return torch.cat(parts).view(x.shape)


def to_nearest(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`; raise ConfigError for a finite value that `dtype` has no room for."""
    rounded = x.to(dtype)
    lost = x[rounded.isinf() & x.isfinite()]
    if len(lost):
        raise ConfigError(
            f"{name} has the value {lost[0]:.6g}, which {dtype} has no room for: it ends at "
            f"{torch.finfo(dtype).max:.6g}. Choose bfloat16 or float32: --model.dtype in another --out, or --dtype of "
            "sftmix export"
        )
    return rounded


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str]:
    """Return what finds the names of tensors that transformers loads in float32 beside others in `dtype`.

    The biases by which some models choose experts are such, as a bfloat16 has no room for their differences.
    """
    # DeepSeek-V3: e_score_correction_bias; Llama: (?!), which finds nothing
    return re.compile("|".join(model._get_dtype_plan(dtype)).replace("*", ".*") or "(?!)")


def routers_in_float32(model: PreTrainedModel) -> list[nn.Module]:
    """Return the routers whose weights transformers keeps in float32 beside others in bfloat16.

    They are known by their names, and are called by their layers: other such modules have their weights read as well.
    """
    kept = kept_in_float32(model, torch.bfloat16)
    found = []
    for name, module in model.named_modules():
        weights = [weight for weight, _ in module.named_parameters(name)]
        if name.endswith((".gate", ".router")) and weights and all(map(kept.search, weights)):
            found.append(module)
    return found


def casting(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Return the function of a name and value that casts a weight as an export in `dtype` has it."""
    kept = kept_in_float32(model, dtype)
    return lambda name, x: x.to(dtype) if x.is_floating_point() and not kept.search(name) else x


def refuse_overflow(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise ConfigError as `to_nearest` does for a weight to be trained; on the meta device none has a value yet."""
    kept = kept_in_float32(model, dtype)
    for name, weight in model.named_parameters():
        if weight.requires_grad and not weight.is_meta and not kept.search(name):
            to_nearest(name, weight.detach(), dtype)


@torch.no_grad()
def round_in_place(weights: Mapping[str, Tensor], dtype: torch.dtype, *, rounding: str, seed: int) -> None:
    """Round floats to the values of `dtype` in the dtype that they have; with FSDP each rank rounds its shards.

    rounding  stochastic or nearest
    Raises ConfigError as `to_nearest` does, on the rank that holds the value.
    """
    for name, weight in weights.items():
        x, row = weight, 0
        if isinstance(weight, DTensor):
            x = weight.to_local()
            # the first row of this shard: FSDP cuts each weight by rows
            row = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)[1][0]
        if x.is_floating_point():
            rounded = to_nearest(name, x, dtype)
            if rounding == "stochastic":
                start = row * math.prod(x.shape[1:])
                rounded = stochastically_rounded(x, dtype, seed=seed, name=name, start=start)
            x.copy_(rounded)
