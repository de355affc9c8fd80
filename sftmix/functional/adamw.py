"""AdamW without temporaries of a whole matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**24
"""About so many numbers of a matrix are updated at once: 64 MiB in float32."""


class BlockwiseAdamW(torch.optim.AdamW):
    """torch's AdamW for a CPU, which updates a matrix by blocks of rows: the same bits, with less memory.

    torch makes two temporaries of each parameter's size. For an embedding of 262,144 tokens, as Gemma has, they are a
    fifth of what training takes.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill the lists that an update reads: parameters, gradients, their moments and, the last, their steps."""
        # torch 2.13: parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs (empty without amsgrad), steps
        has_complex: bool = super()._init_group(group, *lists)
        *tensors, steps = lists
        # An update adds one to each step: to a parameter's with its first block, to copies with the others.
        steps[:] = [
            step.clone() if at else step
            for parameter, step in zip(tensors[0], steps, strict=True)
            for at in range(len(_blocks(parameter)))
        ]
        for of_kind in tensors:
            of_kind[:] = [block for tensor in of_kind for block in _blocks(tensor)]
        return has_complex


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of a tensor's rows, 64 at a time at least, so that each number keeps its place in a register."""
    if tensor.numel() <= BLOCK:
        return [tensor]
    row = tensor.numel() // len(tensor)  # Gemma 3 270M's embedding, [262144, 640]: 26,176 rows a block
    return tensor.split(64 * max(BLOCK // row // 64, 1))
