"""The same question with another answer."""

import re
from functools import cache
from typing import Any

import numpy as np

from sftmix.tools.suspects.rows import SuspectRows, sentence_model
from sftmix.tools.suspects.signals import Signal, cosines
from sftmix.types import Float64, Rows

NEAR = {True: 0.92, False: 0.8}
"""Cosine from which on two prompts are one question, by the sentence embedding and by words."""


class Conflict(Signal):
    """Another row has nearly the same prompt and another response: the cosine of the prompts minus the responses'.

    The suspect of the two is the row whose response fits its prompt less; the other is shown beside it.
    Prompts with other numbers are other questions.
    """

    limit = 0.25
    relative = False

    def score(self, rows: SuspectRows) -> Float64:
        prompts, responses = rows.vectors
        other, near = nearest_prompts(rows)
        fits = _rowwise(prompts, responses)
        worse = (fits < fits[other]) | ((fits == fits[other]) & (np.arange(len(other)) > other))
        numbers = [sorted(re.findall(r"\d+", prompt)) for prompt in rows.prompts]
        same = [numbers[k] == numbers[j] for k, j in enumerate(other.tolist())]
        repeats = (near >= NEAR[sentence_model(rows.embedding) is not None]) & worse & np.array(same, bool)
        return np.where(repeats, near - _rowwise(responses, responses[other]), 0.0)


@cache
def nearest_prompts(rows: SuspectRows) -> tuple[Rows, Float64]:
    """Return i64[N], the other row whose prompt is nearest to each, and f64[N], the cosines."""
    prompts, _ = rows.vectors
    found = [(block.argmax(1), block.max(1)) for _, block, _ in cosines(prompts, prompts)]
    places, values = zip(*found, strict=True)
    return np.concatenate(places), np.concatenate(values).astype(np.float64)


def _rowwise(one: Any, other: Any) -> Float64:
    """Return the dot products of the rows of two matrices, dense or sparse."""
    product = one.multiply(other) if hasattr(one, "multiply") else one * other
    return np.asarray(product.sum(axis=1), np.float64).ravel()
