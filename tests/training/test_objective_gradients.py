"""The gradients of each objective, cut into ranks and micro-batches, against its formula on one example at a time.

In float64 to 1e-10, through the loss and the normalisation that the loop uses. The hidden states of every row are
leaves, so that what is compared is the objective alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sftmix.batches.collate import collate
from sftmix.batches.deal import micro_steps
from sftmix.batches.order import Slot, Unit
from sftmix.components import DFT, IRDRO, DecomposedMixup, LabelSmoothing, MixupOnly, Need, SFTMix
from sftmix.components.base import Objective
from sftmix.components.contracts import check_loss
from sftmix.components.view import LossView
from sftmix.training.step import normalise
from sftmix.types import Batch, BatchNLL, Plan
from tests.toy import VOCABULARY, toy_rows

RESPONSES = [5, 2, 11, 4, 1, 6, 3, 1, 8, 2]
DATA = toy_rows([(2 + row % 3, length) for row, length in enumerate(RESPONSES)])
UNITS: list[Unit] = [
    (Slot(0), Slot(1)),
    (Slot(2), Slot(3)),
    (Slot(4), Slot(5)),
    (Slot(6), Slot(2, 0.0)),  # a repeat: mixed again, without NTP
    (Slot(7), Slot(9, 0.0)),  # a repeat of a row that had its turn in an earlier batch
    (Slot(8),),
]
PAIRS = [(0, 1), (2, 3), (4, 5), (6, 2), (7, 9)]
TRAINED = [0, 1, 2, 3, 4, 5, 6, 7, 8]
AT = {"step": 3, "total_steps": 10, "seed": 7}
CUTS = [(1, 12), (1, 4), (2, 4), (2, 2), (8, 2)]
"""World sizes and micro-batch sizes; with eight ranks some have no work and get a filler without weight."""


class Head:
    """Leaves: the hidden states Z of every row [n, 8] and the LM head W [V, 8]; labels y of every row."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.W = torch.randn(VOCABULARY, 8, generator=draw, dtype=torch.float64).mul_(0.7).requires_grad_()
        self.Z = [torch.randn(n, 8, generator=draw, dtype=torch.float64).requires_grad_() for n in RESPONSES]
        self.y = [torch.from_numpy(e.input_ids[e.target]) for e in DATA.rows]

    def nll(self, row: int) -> torch.Tensor:
        """f64[n], written with logsumexp."""
        logits = self.Z[row] @ self.W.T
        return logits.logsumexp(-1) - logits.gather(1, self.y[row][:, None])[:, 0]

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(self.leaves, torch.autograd.grad(loss, self.leaves, allow_unused=True), strict=True)
        ]

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.W, *self.Z]


def exact(plan: Plan) -> Plan:
    """The plan in float64, before it is divided. What objectives leave in float32 here is exact in it."""
    return replace(
        plan, row_weight=plan.row_weight.double(), pair_weight=plan.pair_weight.double(), lam=plan.lam.double()
    )


def global_nll(head: Head) -> BatchNLL:
    with torch.no_grad():
        sums = torch.stack([head.nll(row).sum() for row in TRAINED])
    return BatchNLL(torch.tensor(TRAINED), sums, torch.tensor([RESPONSES[row] for row in TRAINED]))


def ours(head: Head, objective: Objective, world: int, micro: int) -> tuple[torch.Tensor, dict[tuple[str, str], list]]:
    """The loss of one global batch, ranks one after the other and averaged as by DDP; the lambdas by pair."""
    steps = micro_steps(UNITS, DATA.lengths, world_size=world, micro_batch_size=micro, max_segments=1)
    batches = [collate(rank, DATA, n_segments=s.n_segments) for s in steps for rank in s.ranks]
    if Need.BATCH_NLL in objective.needs:
        batches = [replace(batch, batch_nll=global_nll(head)) for batch in batches]
    plans = [objective.plan(batch, **AT) for batch in batches]
    counts = {name: sum(getattr(plan, name) for plan in plans) for name in ("ntp_count", "mixup_count")}
    total = torch.zeros((), dtype=torch.float64)
    for batch, plan in zip(batches, plans, strict=True):
        scaled = normalise(exact(plan), **counts, world_size=world)
        hidden = torch.cat([head.Z[row] for row in batch.rows.tolist()])
        lm_head = SimpleNamespace(weight=head.W, bias=None, softcap=None, scale=1.0)
        view = LossView(lm_head, lambda hidden=hidden: hidden, chunk_size=3)
        out = objective.loss(view, batch, scaled)
        check_loss(objective, out, scaled)
        total = total + out.loss
    return total / world, lambdas(batches)


def lambdas(batches: list[Batch]) -> dict[tuple[str, str], list]:
    """Pair of ids -> its lambdas at each position, as SFTMix draws them."""
    found: dict[tuple[str, str], list] = {}
    for batch in batches:
        plan = SFTMix(lambda_per="token").plan(batch, **AT)
        for m, pair in enumerate(batch.pair_index.tolist()):
            c, u = batch.slot_pairs[pair].tolist()
            found.setdefault((batch.ids[c], batch.ids[u]), []).append(float(plan.lam[m]))
    return found


def assert_same(head: Head, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    for ours_, theirs in zip(head.gradients(found), head.gradients(expected), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=1e-10)


def per_pair(head: Head, lam: dict, term: Callable) -> list[torch.Tensor]:
    """For each pair the f64[n] of `term(row c, row u, lambdas [n])`."""
    found = []
    for c, u in PAIRS:
        values = torch.tensor(lam[DATA.ids[c], DATA.ids[u]], dtype=torch.float64)
        assert len(values) == min(RESPONSES[c], RESPONSES[u])
        found.append(term(c, u, values))
    return found


def decomposed(head: Head) -> Callable:
    return lambda c, u, lam: lam * head.nll(c)[: len(lam)] + (1 - lam) * head.nll(u)[: len(lam)]


def mixture(head: Head) -> Callable:
    def term(c, u, lam):
        n, share = len(lam), lam[:, None]
        logp = torch.log_softmax((share * head.Z[c][:n] + (1 - share) * head.Z[u][:n]) @ head.W.T, -1)
        soft = share * F.one_hot(head.y[c][:n], VOCABULARY) + (1 - share) * F.one_hot(head.y[u][:n], VOCABULARY)
        return -(soft * logp).sum(-1)

    return term


def by_token(head: Head, mixed: list[torch.Tensor], *, mu: float, mixup_mean: str) -> torch.Tensor:
    ntp = torch.cat([head.nll(row) for row in TRAINED])
    flat = torch.cat(mixed)
    return ntp.mean() + mu * flat.sum() / (len(flat) if mixup_mean == "own" else len(ntp))


def by_sequence(head: Head, mixed: list[torch.Tensor], *, mu: float, mixup_mean: str) -> torch.Tensor:
    ntp = torch.stack([head.nll(row).mean() for row in TRAINED])
    means = torch.stack([m.mean() for m in mixed])
    return ntp.mean() + mu * means.sum() / (len(means) if mixup_mean == "own" else len(ntp))


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.mark.parametrize(("world", "micro"), CUTS)
@pytest.mark.parametrize("mixup_mean", ["own", "ntp"])
@pytest.mark.parametrize("mean", ["token", "sequence"])
@pytest.mark.parametrize(("cls", "term"), [(SFTMix, mixture), (DecomposedMixup, decomposed)])
def test_mixing_and_its_control(head, world, micro, mixup_mean, mean, cls, term):
    objective = cls(mu=0.75, mixup_mean=mixup_mean, mean=mean, lambda_per="token")
    found, lam = ours(head, objective, world, micro)
    formula = by_token if mean == "token" else by_sequence
    assert_same(head, found, formula(head, per_pair(head, lam, term(head)), mu=0.75, mixup_mean=mixup_mean))


@pytest.mark.parametrize(("world", "micro"), CUTS)
@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_mixup_only(head, world, micro, mean):
    found, lam = ours(head, MixupOnly(lambda_per="token", mean=mean), world, micro)
    mixed = per_pair(head, lam, mixture(head))
    expected = torch.cat(mixed).mean() if mean == "token" else torch.stack([m.mean() for m in mixed]).mean()
    assert_same(head, found, expected)


@pytest.mark.parametrize(("world", "micro"), CUTS)
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_irdro(head, world, micro, tau):
    """The weights are those of the whole global batch, and detached."""
    losses = torch.stack([head.nll(row).mean() for row in TRAINED])
    weights = torch.softmax(losses.detach() / tau, 0)
    assert weights.max() > 2 * weights.min()
    found, _ = ours(head, IRDRO(tau=tau), world, micro)
    assert_same(head, found, (weights * losses).sum())


@pytest.mark.parametrize(("world", "micro"), CUTS)
def test_dft(head, world, micro):
    nll = torch.cat([head.nll(row) for row in TRAINED])
    found, _ = ours(head, DFT(), world, micro)
    assert_same(head, found, ((-nll.detach()).exp() * nll).mean())


@pytest.mark.parametrize(("world", "micro"), CUTS)
def test_label_smoothing(head, world, micro):
    logits, labels = (torch.cat([x[row] for row in TRAINED]) for x in ([z @ head.W.T for z in head.Z], head.y))
    found, _ = ours(head, LabelSmoothing(epsilon=0.2), world, micro)
    assert_same(head, found, F.cross_entropy(logits, labels, label_smoothing=0.2))
