"""Baselines that weigh the NTP loss by token or by example. They do not mix: pairs only decide the order."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sftmix.components.base import Objective
from sftmix.components.component import Need, require
from sftmix.components.objectives import NTP
from sftmix.components.plans import sequence_plan
from sftmix.components.view import LossView, SFTLoss
from sftmix.disk.tables import existing_file, read_counts
from sftmix.ranks.transfer import send
from sftmix.types import Batch, Encoded, Plan


class LabelSmoothing(NTP):
    """NTP whose targets are (1 - epsilon) one-hot + epsilon uniform over the vocabulary."""

    def __init__(self, *, epsilon: float = 0.1):
        """epsilon: mass of the uniform distribution, from 0 (NTP) to below 1."""
        require(0 <= epsilon < 1, "objective.epsilon", epsilon, "from 0 to below 1")
        self.epsilon = epsilon

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return view.sft_loss(batch, plan, label_smoothing=self.epsilon)


class UnigramSmoothing(LabelSmoothing):
    """NTP whose targets are (1 - epsilon) one-hot + epsilon q, with q the frequencies of the response tokens.

    Label smoothing towards the unigram distribution (Pereyra et al. 2017, arXiv 1701.06548). q is counted once, over
    all response tokens of the training examples, whatever the weights of rows; or a distribution of your own.
    """

    def __init__(self, *, epsilon: float = 0.04, distribution: str | None = None):
        """
        epsilon: mass of q, from 0 (NTP) to below 1.
        distribution: a file of q, a count or share for each token id from 0 on, .npy or a list in .json; null: counted.
        """
        super().__init__(epsilon=epsilon)
        self.distribution = distribution

    def files(self) -> Sequence[str]:
        return [existing_file("objective.distribution", self.distribution)] if self.distribution else []

    def check(self, sizes: Mapping[str, int], *, vocabulary: int, **of_run: Any) -> None:
        """Raise DataError for a file that holds no distribution, ConfigError for tokens that the model has not."""
        if self.distribution:
            require(
                len(read_counts("objective.distribution", self.distribution)) <= vocabulary,
                "objective.distribution",
                self.distribution,
                f"shares of the model's {vocabulary:,} token ids",
            )

    def begin(self, examples: Iterable[Encoded]) -> None:
        counts = (
            read_counts("objective.distribution", self.distribution)
            if self.distribution
            else np.bincount(np.concatenate([row.input_ids[1:][row.target[1:]] for row in examples]))
        )
        self.q = counts / counts.sum()  # up to the largest id with a share

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        import torch

        ntp, y, weight_T = view.sft_loss(batch, plan), batch.labels, self.epsilon * plan.row_weight
        if not self.epsilon:
            return ntp
        # (1 - epsilon) CE(y) + epsilon CE(q) = CE(y) + epsilon (z_y - q.z), as both have the same log sum exp
        n = len(self.q)
        q = send(torch.from_numpy(self.q), y.device)
        # z = scale W h: then no logits are needed. Read once: an adapted head computes its weight at each use.
        weight_VD = view.head.weight if view.head.softcap is view.head.bias is None else None
        # Gradients of rows that many tokens share are not added up in bfloat16, which FSDP's weights have.
        if weight_VD is not None and (not weight_VD.requires_grad or weight_VD.dtype.itemsize > 2):
            with torch.autocast(y.device.type, enabled=False):  # which would copy the weight
                direction_TD = weight_VD[y] - q.to(weight_VD) @ weight_VD[:n]
            extra = (weight_T * view.head.scale * (view.hidden * direction_TD).sum(1)).sum()
        else:

            def above(z, y):
                return z.gather(1, y[:, None])[:, 0] - z[:, :n] @ q.to(z)

            extra = view.chunked_loss(view.hidden, above, y, row_weight=weight_T).loss
        return ntp._replace(loss=ntp.loss + extra)


class DFT(NTP):
    """Dynamic fine-tuning (arXiv 2508.05629): each token's NLL times its own probability, detached.

    The sum is divided by the number of response tokens. Its authors read it as a policy gradient whose implicit reward
    no longer grows as 1 / p.
    """

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return view.sft_loss(batch, plan, rule=lambda nll, entropy: (-nll).exp())  # p of the label


class IRDRO(Objective):
    """Instance-reweighted, distributionally robust optimisation (arXiv 2402.14270): a higher loss weighs more.

    loss_i is the mean NLL of response i, w = softmax(loss / tau) over the whole global batch, detached, and
    L = sum_i w_i loss_i. Each step costs one more forward pass, which gives the losses that set the weights.
    """

    needs = frozenset({Need.BATCH_NLL})

    def __init__(self, *, tau: float = 1.0):
        """tau: temperature, above 0; a smaller one moves more weight to the hardest examples."""
        require(0 < tau < math.inf, "objective.tau", tau, "a number above 0 (its authors: 1)")
        self.tau = tau

    def plan(self, batch: Batch, **at: Any) -> Plan:
        import torch

        of_batch = batch.batch_nll
        assert of_batch is not None
        if not len(of_batch.rows):  # nothing but repeats, which are trained no second time
            return sequence_plan(batch, batch.ntp_weight * 0)
        weight_G = torch.softmax(of_batch.nll_sum.double() / of_batch.n_tokens / self.tau, dim=0)
        # rows [3, 7, 9], batch [7, 3]: places 1 and 0; a filler's row may be missing, and has ntp_weight 0
        place = torch.searchsorted(of_batch.rows, batch.rows).clamp(max=len(weight_G) - 1)
        return sequence_plan(batch, torch.where(batch.ntp_weight > 0, weight_G[place], 0.0))
