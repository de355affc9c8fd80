"""The base class of orders: in which order an epoch without pairs goes through the examples."""

from abc import ABC, abstractmethod

from sftmix.components.component import Component
from sftmix.types import Rows, Scores


class Order(Component, ABC):
    """The order of the examples in an epoch without pairs; it may need CONFIDENCE, MEAN_STATES or TEXTS."""

    option = "order"

    @abstractmethod
    def rows(self, scores: Scores, *, epoch: int, seed: int) -> Rows:
        """Return i64[N], each row once, in the order in which they are trained on."""
