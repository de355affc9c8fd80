"""Objectives that weigh each response token, by the model's own probabilities or a stored reference's.

A stored reference is confidence/dynamics.parquet of `sftmix confidence --reference.token_nll true`, made of the same
rows with the same tokenizer, template and length. PriFT takes its first checkpoint, the model before training, Rho1 its
last.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from sftmix.components.base import Objective
from sftmix.components.component import Need, require
from sftmix.components.objectives import NTP
from sftmix.components.view import LossView, SFTLoss
from sftmix.disk.places import place_of
from sftmix.disk.tables import existing_file, read_dynamics
from sftmix.ranks.transfer import send
from sftmix.types import Batch, Encoded, Plan, Tensor
from sftmix.words.errors import ConfigError, DataError


class TokenWeights(Objective):
    """NTP with a factor for the NLL of each token; the Mixup of another objective beside it has none.

    The NTP sum is divided by the number of response tokens, unless a class says otherwise.
    """

    def __init__(self, *, mixup: Objective | None = None):
        """mixup: the objective whose NTP is weighed, such as SFTMix with its options; null: NTP, without pairs."""
        self.inner = mixup or NTP()
        if Need.TEACHER in self.needs and self.inner.teacher_decay is not None:
            raise ConfigError(
                f"objective {type(self).__name__} and objective.mixup {self.inner} exclude each other: the teacher of "
                "the first has the weights before training, that of the second an average; leave out one of the two"
            )
        self.needs = self.needs | self.inner.needs
        self.gives, self.teacher_decay = self.gives & self.inner.gives, self.inner.teacher_decay
        self.passes = self.inner.passes

    def check(self, sizes: Mapping[str, int], **of_run: Any) -> None:
        self.inner.check(sizes, **of_run)

    def begin(self, examples: Iterable[Encoded]) -> None:
        self.inner.begin(examples)

    @abstractmethod
    def factors(self, view: LossView, batch: Batch) -> Tensor:
        """Return [T], the factor of each response token, detached."""

    def plan(self, batch: Batch, **at: Any) -> Plan:
        return self.inner.plan(batch, **at)

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        return self.inner.loss(view, batch, replace(plan, row_weight=plan.row_weight * self.factors(view, batch)))


class ProFit(TokenWeights):
    """ProFit (arXiv 2601.09195): only the tokens with a probability above a threshold are trained."""

    def __init__(self, *, threshold: float = 0.1, mixup: Objective | None = None):
        """
        threshold: a probability from 0 (NTP) to below 1.
        mixup: the objective whose NTP is weighed, such as SFTMix with its options; null: NTP, without pairs.
        """
        super().__init__(mixup=mixup)
        require(0 <= threshold < 1, "objective.threshold", threshold, "from 0 to below 1")
        self.threshold = threshold

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        return ((-_nll(view, batch)).exp() > self.threshold).float()


class EAFT(TokenWeights):
    """Entropy-adaptive fine-tuning (arXiv 2601.02151): each token's NLL times the entropy of the likeliest tokens.

    The probabilities of the 20 likeliest tokens are normalised among themselves, and their entropy is divided by
    log 20. A token that contradicts a model which is sure of itself has a factor near 0.
    """

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        def entropy(logits):
            log_p = logits.topk(min(20, logits.shape[-1])).values.log_softmax(-1)  # [r, 20]
            return -(log_p.exp() * log_p).sum(-1) / math.log(20)

        return view.figures(entropy)


class StoredReference(TokenWeights):
    """Token weights from the dynamics of an earlier run."""

    untrained = False
    """True if the first checkpoint must be of a model before training."""

    def __init__(self, *, dynamics: str, mixup: Objective | None = None):
        """
        dynamics: a dynamics.parquet with the NLL of each token.
        mixup: the objective whose NTP is weighed, such as SFTMix with its options; null: NTP, without pairs.
        """
        super().__init__(mixup=mixup)
        self.dynamics = dynamics

    def files(self) -> list[str]:
        return [existing_file("objective.dynamics", self.dynamics)]

    @cached_property
    def stored(self) -> Mapping[str, Any]:
        """The NLL of each example's tokens in the file, [C, n], by id; DataError if it has none.

        Nothing else of the file stays in memory, such as the states of the rows.
        """
        dynamics = read_dynamics(place_of(self.dynamics))
        if dynamics.token_nll is None:
            raise DataError(
                f"objective.dynamics: {self.dynamics} has no NLL of tokens; write it with --reference.token_nll true"
            )
        if self.untrained and (first := int(dynamics.steps[0])) > 1:  # models of FromCheckpoints count from 1
            raise ConfigError(
                f"objective.dynamics: the first checkpoint of {self.dynamics} is of step {first} of a training, and "
                f"{self} weighs by the model before it; make the file with --reference.checkpoints '[0, 1]'"
            )
        return dict(zip(dynamics.ids, dynamics.token_nll, strict=True))

    def check(self, sizes: Mapping[str, int], **of_run: Any) -> None:
        """Raise DataError for a file without what is read of it, ConfigError for one with other tokens."""
        super().check(sizes, **of_run)
        stored = {name: nll.shape[1] for name, nll in self.stored.items()}
        wrong = [name for name, size in sizes.items() if stored.get(name, 0) != size]
        if wrong:
            raise ConfigError(
                f"objective.dynamics: {self.dynamics} has other tokens for {len(wrong):,} of {len(sizes):,} examples, "
                f"such as {wrong[0]}: {stored.get(wrong[0], 0)} of {sizes[wrong[0]]} (0: not scored). Make it of the "
                "same rows, with the same tokenizer, template and length, or leave these out (data.exclude)"
            )

    def reference_nll(self, batch: Batch, checkpoint: int = 0) -> Tensor:
        """Return f64[T], the NLL of each response token at a checkpoint, of rows that `check` has seen."""
        import torch

        # `check` has seen that all rows have as many: one that was cut to measure memory has its last tokens.
        nll = []
        for name, example in zip(batch.ids, batch.examples, strict=True):
            of_row = self.stored[name][checkpoint]
            nll.append(of_row[len(of_row) - int(example.target[1:].sum()) :])
        return send(torch.from_numpy(np.concatenate(nll).astype(np.float64)), batch.labels.device)


class PriFT(StoredReference):
    """PriFT-prob (arXiv 2606.09396): each token's NLL times its probability under the pretrained model.

    That is the first checkpoint of `dynamics`: 0 of `reference.checkpoints`, or the first model of FromCheckpoints.
    """

    untrained = True

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        return (-self.reference_nll(batch)).exp()  # p_ref of the label


class ASFT(TokenWeights):
    """Anchored SFT (arXiv 2509.23753): DFT plus kl times the divergence from the model before training to the model.

    It is KL(p_ref || p) over the whole vocabulary, averaged over the response tokens, in the direction of the authors'
    code; their text has the other one. Each step costs one more forward, and full weights are kept twice.
    """

    needs, gives = frozenset({Need.TEACHER}), frozenset()

    def __init__(self, *, kl: float = 0.1, mixup: Objective | None = None):
        """
        kl: weight of the divergence, 0 or above.
        mixup: the objective whose NTP is weighed, such as SFTMix with its options; null: NTP, without pairs.
        """
        super().__init__(mixup=mixup)
        require(0 <= kl < math.inf, "objective.kl", kl, "a number from 0")
        self.kl = kl

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        return (-_nll(view, batch)).exp()

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        import torch.nn.functional as F

        def divergence(logits, states):
            expected = view.teacher.logits(states).log_softmax(-1)
            return F.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)

        out, weight_T = super().loss(view, batch, plan), self.kl * plan.row_weight
        return out._replace(
            loss=out.loss + view.chunked_loss(view.hidden, divergence, view.teacher.hidden, row_weight=weight_T).loss
        )


class Rho1(StoredReference):
    """Rho-1 (arXiv 2404.07965): only the tokens with the largest excess loss, NLL minus reference NLL, are trained.

    The paper ranks the tokens of a batch; here the tokens of each response are ranked, so that nothing depends on how a
    batch is cut. The NTP sum is divided by the number of tokens that are trained, each with its weight under `mixup`
    (the mean of its response, where tokens of one have several).
    """

    def __init__(self, *, dynamics: str, share: float = 0.6, mixup: Objective | None = None):
        """
        dynamics: a dynamics.parquet with the NLL of each token.
        share: share of each response's tokens that are trained, rounded up, above 0 and below 1.
        mixup: the objective whose NTP is weighed, such as SFTMix with its options; null: NTP, without pairs.
        """
        super().__init__(dynamics=dynamics, mixup=mixup)
        require(0 < share < 1, "objective.share", share, "above 0 and below 1")
        self.share = share

    def plan(self, batch: Batch, **at: Any) -> Plan:
        plan, size_B = super().plan(batch, **at), batch.n_tokens
        # 1e-9, as 0.07 * 100 is 7.000000000000001 and would be rounded up to 8
        share_B = (self.share * size_B.double() - 1e-9).ceil() / size_B.clamp(min=1)
        weight_T = plan.row_weight.double() * share_B[batch.slot]  # `factors` divides by the share again
        of_prompts = plan.ntp_count - float(plan.row_weight.double().sum())  # what `mixup` counts of them
        return replace(plan, row_weight=weight_T, ntp_count=of_prompts + float(weight_T.sum()))

    def factors(self, view: LossView, batch: Batch) -> Tensor:
        import torch

        excess = _nll(view, batch) - self.reference_nll(batch, -1)
        trained = []
        for of_response in excess.split([int(example.target[1:].sum()) for example in batch.examples]):
            rank = of_response.argsort(descending=True, stable=True).argsort()  # 0.2, 0.9, 0.5: 2, 0, 1
            kept = math.ceil(self.share * len(rank) - 1e-9)
            trained.append((rank < kept).to(excess) * (len(rank) / max(kept, 1)))
        return torch.cat(trained)


def _nll(view: LossView, batch: Batch) -> Tensor:
    """Return [T], the NLL of each response token, detached."""
    import torch.nn.functional as F

    return view.figures(partial(F.cross_entropy, reduction="none"), batch.labels)
