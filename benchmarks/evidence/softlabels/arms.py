"""Controls of preregistration-softlabels.md: where a label is softened, and towards what; and who is paired with whom.

TOKENS is a .npy file, i64[n]: the response tokens of all training rows of a seed, which run.py writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sftmix.components import NTP, LossView, RandomPairs, SoftLabels
from sftmix.components.component import require
from sftmix.components.others.places import mixed_cross_entropy
from sftmix.functional import SFTLoss
from sftmix.ranks.rng import generator
from sftmix.types import Batch, Plan, Rows, Scores, Split, Tensor


class UnigramSmoothing(NTP):
    """NTP whose targets are (1 - epsilon) one-hot + epsilon q, with q the frequencies of the response tokens."""

    def __init__(self, *, tokens: str, epsilon: float = 0.04):
        """
        tokens: a .npy file of the response tokens whose frequencies are q.
        epsilon: mass of q, from 0 (NTP) to below 1.
        """
        require(0 <= epsilon < 1, "objective.epsilon", epsilon, "from 0 to below 1")
        self.tokens, self.epsilon = tokens, epsilon

    def files(self) -> Sequence[str]:
        return [self.tokens]

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        # (1 - epsilon) CE(y) + epsilon CE(q) = CE(y) + epsilon (z_y - q.z), as both have the same log sum exp
        ntp, q = view.sft_loss(batch, plan), self._frequencies(view.hidden)

        def pull(z: Tensor, y: Tensor) -> Tensor:
            return z.gather(1, y[:, None]).squeeze(1) - z[:, : len(q)] @ q.to(z)

        extra = view.chunked_loss(view.hidden, pull, batch.labels, row_weight=self.epsilon * plan.row_weight)
        return ntp._replace(loss=ntp.loss + extra.loss)

    def _frequencies(self, like: Tensor) -> Tensor:
        """Return f64[largest token + 1]; larger ones have the frequency 0."""
        counts = np.bincount(np.load(self.tokens))
        return torch.from_numpy(counts / counts.sum()).to(like.device)


@dataclass(frozen=True)
class Elsewhere(Plan):
    """labels  i64[M, 2], instead of the partner's label for column 0 and for column 1 of each token pair"""

    labels: Tensor | None = None


class SoftElsewhere(SoftLabels):
    """SoftLabels whose other label is not the partner's: it is that of a random place of the training responses.

    Each row of a token pair has its own; the own labels, lambdas, weights and counts are SoftLabels'.
    """

    def __init__(self, *, tokens: str, mu: float = 0.2, alpha: float = 0.5):
        """
        tokens: a .npy file of the response tokens among which the other labels are drawn.
        mu, alpha: as for SFTMix.
        """
        super().__init__(mu=mu, alpha=alpha)
        self.tokens = tokens

    def files(self) -> Sequence[str]:
        return [self.tokens]

    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        plan, pool = super().plan(batch, step=step, total_steps=total_steps, seed=seed), np.load(self.tokens)
        sizes = batch.pair_index.bincount(minlength=len(batch.slot_pairs)).tolist()
        drawn = [np.empty((0, 2), dtype=np.int64)]
        for (first, second), size in zip(batch.slot_pairs.tolist(), sizes, strict=True):
            rng = generator(seed, "elsewhere", step, batch.ids[first], batch.ids[second])
            drawn.append(pool[rng.integers(len(pool), size=(size, 2))])
        return Elsewhere(**vars(plan), labels=torch.from_numpy(np.concatenate(drawn)))

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        assert isinstance(plan, Elsewhere)
        assert plan.labels is not None
        (i, j), ntp = plan.pairs.unbind(1), view.sft_loss(batch, plan.without_pairs())
        columns = batch.labels[i], batch.labels[j], *plan.labels.unbind(1), plan.lam
        both = view.hidden[i], view.hidden[j]
        loss, each = view.chunked_loss(both, elsewhere, *columns, row_weight=plan.pair_weight)
        return ntp._replace(loss=ntp.loss + loss, mixup=each)


def elsewhere(z_c: Tensor, z_u: Tensor, y_c: Tensor, y_u: Tensor, r_c: Tensor, r_u: Tensor, lam: Tensor) -> Tensor:
    """Return the loss [r] of pairs with the logits z [r, V], own labels y [r], other labels r [r] and lambda [r]."""
    of_c, of_u = mixed_cross_entropy(z_c, y_c, r_c, lam), mixed_cross_entropy(z_u, r_u, y_u, lam)
    return lam * of_c + (1 - lam) * of_u


class PermutedPairs(RandomPairs):
    """The batches of RandomPairs, in which each example has a random partner of the batch, of either half."""

    def __init__(self, *, batch: int):
        """batch: pairs of a global batch, 1 or more."""
        require(batch >= 1, "pairing.batch", batch, "1 and above")
        self.batch = batch

    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        ordered, rng = super().pairs(split, scores, epoch=epoch, seed=seed), generator(seed, "permuted", epoch)
        parts = [ordered[start : start + self.batch] for start in range(0, len(ordered), self.batch)]
        pairs = np.concatenate([rng.permutation(part.flatten()).reshape(-1, 2) for part in parts])
        confidence = scores.confidence[pairs]  # column 0 is the more confident, as everywhere
        return np.where((confidence[:, 0] < confidence[:, 1])[:, None], pairs[:, ::-1], pairs)
