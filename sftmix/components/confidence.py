"""Confidence estimators: training dynamics -> one number per example."""

import numpy as np

from sftmix.components.base import ConfidenceEstimator
from sftmix.components.component import Need
from sftmix.disk.places import place_of
from sftmix.disk.tables import existing_file, read_columns
from sftmix.types import Bool, Float64, TrainingDynamics
from sftmix.words.errors import DataError

LEAST = float(np.finfo(np.float64).min)
"""In place of -inf, which is no confidence: it ranks below every other. See `is_measured`."""


class Perplexity(ConfidenceEstimator):
    """The paper's confidence: minus the perplexity of the response, averaged over the checkpoints.

    Conf = -(1/C) sum_c exp(nll_sum_c / n_tokens). A perplexity beyond float64, which only dynamics from a file can have
    (a reference's own count as not scored), gives LEAST, and ranks last.
    """

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        with np.errstate(over="ignore"):
            return np.maximum(-perplexity(dynamics).mean(axis=1), LEAST)  # [N]; NaN, not scored, stays NaN


class LogPerplexity(ConfidenceEstimator):
    """Minus the mean NLL per response token, averaged over the checkpoints: outliers weigh less."""

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        return -dynamics.mean_nll.mean(axis=1)


class FromFile(ConfidenceEstimator):
    """Scores of your own, read from a file and joined by example id; no reference is trained."""

    gives = frozenset({Need.CONFIDENCE})

    def __init__(self, *, path: str):
        """path: a Parquet or CSV file with the columns id and score (higher: more confident) of at least all examples
        that are trained on."""
        self.path = path

    def files(self) -> list[str]:
        return [existing_file("confidence.path", self.path)]

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        # `dynamics` are ids alone here (Need.CONFIDENCE)
        table = read_columns(place_of(self.path), "id", "score")
        score = dict(zip(table["id"], table["score"].tolist(), strict=True))
        if missing := [name for name in dynamics.ids if name not in score]:
            raise DataError(
                f"confidence.path: {self.path} has no score of {len(missing):,} of {len(dynamics.ids):,} examples, "
                f"first {missing[0]}; their ids are in split/split.parquet of a run on the same rows"
            )
        return np.asarray([score[name] for name in dynamics.ids])


def is_measured(confidence: Float64) -> Bool:
    """Return bool[N]: True for a confidence that means and pictures can count, which is neither NaN nor LEAST."""
    return np.isfinite(confidence) & (confidence > LEAST)


def perplexity(dynamics: TrainingDynamics) -> Float64:
    """Return f64[N, C], the perplexity of each response at each checkpoint; NaN if it was not scored."""
    with np.errstate(over="ignore"):
        return np.exp(dynamics.mean_nll)


def variability(dynamics: TrainingDynamics) -> Float64:
    """Return f64[N], the population standard deviation of the perplexity over the checkpoints.

    NaN if the example was not scored, inf if a perplexity or its square is beyond float64.
    """
    # numpy's deviation of inf is NaN, which would mean that the example was not scored
    perplexity_NC = perplexity(dynamics)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isinf(perplexity_NC).any(axis=1), np.inf, np.std(perplexity_NC, axis=1))
