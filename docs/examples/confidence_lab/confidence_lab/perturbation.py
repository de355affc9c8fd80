from collections.abc import Sequence

import torch

from sftmix.components import Perturbation
from sftmix.ranks.rng import generator


class TokenDropout(Perturbation):
    """Sets the embeddings of a random share of each example's tokens to zero."""

    def __init__(self, *, rate: float = 0.05):
        """rate: probability of a token to be blanked, in [0, 1)."""
        self.rate = rate

    def embeddings(
        self, e: torch.Tensor, mask: torch.Tensor, *, ids: Sequence[str], step: int, seed: int
    ) -> torch.Tensor:
        kept = torch.ones(mask.shape)
        for place, (example_id, length) in enumerate(zip(ids, mask.sum(dim=1).tolist(), strict=True)):
            drawn = generator(seed, "token_dropout", step, example_id).random(length)
            kept[place, :length] = torch.from_numpy(drawn >= self.rate).float()
        return e * kept[:, :, None].to(device=e.device, dtype=e.dtype)
