"""Perturbations: changes of the input embeddings in training steps, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sftmix.common.rng import generator
from sftmix.components.base import Perturbation, check_number
from sftmix.types import Tensor


class NEFTune(Perturbation):
    """Uniform noise on the embeddings of each example's tokens (arXiv 2310.05914, a baseline).

    The noise is uniform in (-1, 1), times alpha / sqrt(L D), where L counts the example's own tokens and D is the
    embedding size: its expected norm is then the same for every length. Padding gets none, so that neither the noise
    nor its size depends on the other examples of a batch.
    """

    def __init__(self, *, alpha: float = 5.0) -> None:
        """alpha: size of the noise, above 0; the authors tried 5, 10 and 15."""
        check_number("perturbation.alpha", alpha, above=0, hint="a number above 0 (its authors: 5, 10 or 15)")
        self.alpha = alpha

    def embeddings(self, e: Tensor, mask: Tensor, *, ids: Sequence[str], step: int, seed: int) -> Tensor:
        import torch

        real = mask.bool()
        size = e.shape[-1]
        noise = torch.zeros(e.shape, dtype=torch.float32)
        for place, (example_id, length) in enumerate(zip(ids, real.sum(dim=1).tolist(), strict=True)):
            drawn = generator(seed, "neftune", step, example_id).random((length, size), dtype="float32")
            scale = self.alpha / math.sqrt(max(length * size, 1))
            noise[place, real[place].cpu()] = torch.from_numpy((2 * drawn - 1) * scale)
        return e + noise.to(device=e.device, dtype=e.dtype)
