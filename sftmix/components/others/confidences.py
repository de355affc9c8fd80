"""Confidence by measures of other papers: right tokens, change, the help of an instruction, how early one learns."""

from typing import Literal

import numpy as np

from sftmix.components.base import ConfidenceEstimator
from sftmix.components.component import Need, require_one_of
from sftmix.components.confidence import LEAST, variability
from sftmix.types import NOT_COUNTED, Float64, TrainingDynamics
from sftmix.words.errors import ConfigError

Checkpoint = Literal["first", "last", "mean"]


class Correctness(ConfidenceEstimator):
    """Share of response tokens that are the argmax, averaged over the checkpoints.

    Dataset Cartography's correctness (arXiv 2009.10795), as a share of tokens.
    """

    needs = frozenset({Need.CORRECT})

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        if (dynamics.n_correct == NOT_COUNTED).any():
            raise ConfigError(
                "confidence Correctness needs the number of correct tokens, which these dynamics do not hold; use a "
                "number of --reference.checkpoints (online losses have none)"
            )
        # [N, C] / [N, 1]; NaN of examples that were not scored
        return (dynamics.n_correct / np.where(dynamics.scored, dynamics.n_tokens, np.nan)[:, None]).mean(axis=1)


class LowVariability(ConfidenceEstimator):
    """Minus the standard deviation of the perplexity over the checkpoints: the smallest change ranks first.

    Dataset Cartography's variability (arXiv 2009.10795) instead of its confidence. It needs 2 checkpoints.
    """

    least_checkpoints = 2

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        if len(dynamics.steps) < 2:
            raise ConfigError(
                "confidence LowVariability needs at least 2 checkpoints, which these dynamics do not hold; use more "
                "--reference.checkpoints"
            )
        return np.maximum(-variability(dynamics), LEAST)


class IFD(ConfidenceEstimator):
    """Minus the Instruction-Following Difficulty (arXiv 2308.12032): how little the instruction helps.

    IFD = (NLL of the response after its instruction) / (NLL of the response alone), means over its tokens. Near 1 or
    above, the instruction does not help: the paper calls such an example hard, and selects the hard ones. If the
    response alone has NLL 0, IFD is 1 if the NLL after the instruction is also 0; else the confidence is LEAST.
    """

    needs = frozenset({Need.RESPONSE_ALONE})

    def __init__(self, *, checkpoint: Checkpoint = "first"):
        """checkpoint: the scoring of the reference that is used; the paper of IFD uses a model with little training."""
        require_one_of("confidence.checkpoint", checkpoint, Checkpoint)
        self.checkpoint = checkpoint

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        alone = dynamics.alone_nll_sum
        if alone is None:
            raise ConfigError(
                "confidence IFD needs the NLL of each response without its instruction, which these dynamics do not "
                "hold; use --reference.response_alone true, in another --out"
            )
        with np.errstate(all="ignore"):
            ratio_NC = dynamics.nll_sum / alone  # sums of as many tokens, so it is the ratio of their means
        ratio_NC[(dynamics.nll_sum == 0) & (alone == 0)] = 1.0
        chosen = {"first": ratio_NC[:, 0], "last": ratio_NC[:, -1], "mean": ratio_NC.mean(axis=1)}
        return np.where(dynamics.scored, np.maximum(-chosen[self.checkpoint], LEAST), np.nan)


class LearningPercentage(ConfidenceEstimator):
    """Share of the fall in perplexity reached at the first checkpoint (arXiv 2402.10430): learned early is easy.

    LP(1) = (P_0 - P_1) / (P_0 - P_C), with P_0 before training, P_1 at the first checkpoint after it, P_C at the last.
    The paper takes P_1 after the first epoch, and trains on the hard examples, which have a low LP(1). If the
    perplexity of an example has not fallen at the end, the example was never learned: it has LEAST and ranks last.
    """

    needs = frozenset({Need.BEFORE_TRAINING})
    least_checkpoints = 3

    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        steps = dynamics.steps.tolist()
        if steps[:1] != [0] or len(steps) < 3:
            raise ConfigError(
                "confidence LearningPercentage needs the perplexity before training and at 2 later checkpoints, which "
                "these dynamics do not hold; use --reference.checkpoints [0, 0.33, 1] or a longer list (they are of "
                f"the steps {steps})"
            )
        nll_NC = dynamics.mean_nll
        with np.errstate(all="ignore"):  # divided by P_0: this fits float64 even if a perplexity does not
            change_NC = np.expm1(nll_NC - nll_NC[:, :1])  # P_c / P_0 - 1
            learned = np.where(change_NC[:, -1] < 0, change_NC[:, 1] / change_NC[:, -1], -np.inf)
        return np.where(dynamics.scored, np.maximum(learned, LEAST), np.nan)
