"""Manifold Mixup in a random layer (arXiv 1806.05236); `--objective random_layer.RandomLayer`."""

from sftmix.components import ManifoldMixup
from sftmix.components.component import require


class RandomLayer(ManifoldMixup):
    """SFTMix whose states are mixed after a decoder layer that each step draws, from `first` to `last`; left out: the
    paper trains on mixtures alone, of partners from anywhere, with one lambda for a batch."""

    def __init__(self, *, mu: float = 0.2, first: int = 0, last: int = 2):
        """
        mu: weight of the Mixup term, from 0.
        first: the lowest layer that is drawn; 0 is the embeddings.
        last: the highest layer that is drawn.
        """
        require(0 <= first <= last, "objective.last", last, f"objective.first ({first}) and above")
        super().__init__(mu=mu, layers=list(range(first, last + 1)))
