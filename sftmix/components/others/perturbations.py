"""Perturbations: changes of the input embeddings in training steps, and nowhere else."""

import math
from collections.abc import Sequence

import numpy as np

from sftmix.components.base import Perturbation
from sftmix.components.component import require
from sftmix.ranks.rng import generator
from sftmix.ranks.transfer import send
from sftmix.types import Tensor


class NEFTune(Perturbation):
    """Uniform noise on the embeddings of each example's tokens (arXiv 2310.05914, a baseline).

    The noise is uniform in (-1, 1), times alpha / sqrt(L D), where L counts the example's own tokens and D is the
    embedding size: its expected norm is then the same for every length. Padding gets none, so that neither the noise
    nor its size depends on the other examples of a batch.
    """

    def __init__(self, *, alpha: float = 5.0):
        """alpha: size of the noise, above 0; the authors tried 5, 10 and 15."""
        require(0 < alpha < math.inf, "perturbation.alpha", alpha, "a number above 0 (its authors: 5, 10 or 15)")
        self.alpha = alpha

    def embeddings(self, e: Tensor, mask: Tensor, *, ids: Sequence[str], step: int, seed: int) -> Tensor:
        import torch

        # The first numbers of an example do not depend on the length of its line, so the lengths stay on the device.
        drawn = [generator(seed, "neftune", step, one).random(e.shape[1:], dtype="float32") for one in ids]
        noise = send(torch.from_numpy(2 * np.stack(drawn) - 1), e.device)
        # mask 0 1 1 0: places 0 0 1 1, so that padding on the left shifts the noise with the tokens
        place = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :, None].expand_as(noise)
        numbers = mask.sum(dim=1).double() * e.shape[-1]  # L D of each example
        scale = (self.alpha / numbers.clamp(min=1).sqrt()).float()[:, None, None]
        return e + torch.where(mask.bool()[:, :, None], noise.gather(1, place) * scale, 0.0).to(e.dtype)
