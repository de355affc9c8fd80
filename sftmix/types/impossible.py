"""Numbers that no training dynamics have."""

from collections.abc import Iterator

import numpy as np

from sftmix.types import NOT_COUNTED, Bool, TrainingDynamics


def impossible_numbers(dynamics: TrainingDynamics) -> Iterator[tuple[str, Bool, str]]:
    """Yield (column, bool[N, C] or [N, 1], True for a number that is impossible, what is allowed)."""
    n_tokens, n_correct = dynamics.n_tokens[:, None], dynamics.n_correct
    counted = (n_correct >= NOT_COUNTED) & (n_correct <= n_tokens)
    yield "n_tokens", n_tokens < 0, "0 (not scored) and above"
    yield "n_correct", ~counted, f"0 to n_tokens, or {NOT_COUNTED} (not counted)"
    for name in ("nll_sum", "alone_nll_sum"):
        if (nll := getattr(dynamics, name)) is not None:
            good = np.isfinite(nll) & (nll >= 0)
            yield name, ~good & (n_tokens > 0), "finite numbers from 0 where n_tokens is above 0"
