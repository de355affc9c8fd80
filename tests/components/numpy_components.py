"""A user's module of components whose answers are not quite what they should be, but are accepted
(test_contracts.py)."""

import dataclasses

import numpy as np

from sftmix.components import Callback, CallbackResult, Median


class Numpy(Callback):
    """Its metrics are numbers of numpy."""

    gives = frozenset()

    def on_step_end(self, state):
        return CallbackResult(metrics={"mine": np.float32(1.5), "count": np.int64(3)})


class AsList(Median):
    """Its groups are in a list, not in an array."""

    def split(self, scores, *, seed):
        found = super().split(scores, seed=seed)
        return dataclasses.replace(found, group=found.group.tolist())
