"""A selector that mixes sources.

Copy it to where `sftmix` is started: `--selector shares.Shares --selector.field source --selector.k 1000
--selector.shares '{books: 0.7, news: 0.3}'`.
"""

import math

import numpy as np

from sftmix.components import Selector
from sftmix.components.component import require
from sftmix.ranks.rng import stable_hash
from sftmix.types import Rows, Scores
from sftmix.words.fields import listed
from sftmix.words.given import spelling


class Shares(Selector):
    """A mixture of sources: so many examples with each value of a row field, chosen by id and seed.

    Examples with another value are not selected; one without a value has "".
    """

    def __init__(self, *, field: str, shares: dict[str, float], k: int):
        """
        field: name of the row field that holds the source, or `label` for the label, if the rows have one.
        shares: value of the field -> share of the k examples; the shares add up to 1, and parts are rounded.
        k: number of examples to keep.
        """
        are_shares = min(shares.values(), default=-1) >= 0 and math.isclose(sum(shares.values()), 1)
        require(are_shares, "selector.shares", shares, "shares from 0 that add up to 1")
        self.field, self.shares, self.k = field, shares, k

    def select(self, scores: Scores, *, seed: int) -> Rows:
        columns = {**scores.columns, "label": scores.label} if scores.label else scores.columns
        require(self.field in columns, "selector.field", self.field, f"a field of the rows: {', '.join(columns)}")
        values = ["" if value is None else spelling(value) for value in columns[self.field]]
        chosen = []
        for value, share in self.shares.items():
            rows = [row for row, source in enumerate(values) if source == spelling(value)]
            wanted = round(share * self.k)
            allowed = f"from 0 to {len(rows)} of the {self.k} examples with {self.field} {value!r}: there are no more"
            allowed += f"; the values there are {listed(sorted(set(values)))}"
            require(0 <= wanted <= len(rows), "selector.shares", self.shares, allowed)
            chosen += sorted(rows, key=lambda row: stable_hash(seed, "shares", scores.id[row]))[:wanted]
        return np.sort(chosen)
