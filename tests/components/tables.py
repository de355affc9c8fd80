"""Tables of scores, as splitters, pair samplers and selectors see them."""

import numpy as np

from sftmix.types import Scores


def scores(n_tokens, *, confidence=None, ids=None, label=None, **columns):
    """Rows e0, e1, ... with so many response tokens; without a confidence if none is given."""
    n = len(n_tokens)
    return Scores(
        id=ids or [f"e{i}" for i in range(n)],
        row=np.arange(n),
        confidence=np.full(n, np.nan) if confidence is None else np.asarray(confidence, dtype=np.float64),
        variability=np.zeros(n),
        n_tokens=np.asarray(n_tokens, dtype=np.int64),
        label=label,
        columns=columns,
    )
