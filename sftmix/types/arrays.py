"""Names of arrays and tensors in annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Int64 = npt.NDArray[np.int64]
Rows = Int64
"""Row numbers of the data set, or pairs of them; other whole numbers are Int64."""
Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Tensor: TypeAlias = "torch.Tensor"
"""A torch tensor, for component modules, whose `if TYPE_CHECKING:` blocks the command line executes, without torch."""
TorchOptimizer: TypeAlias = "torch.optim.Optimizer"
