"""The gradients of each objective, cut into ranks and micro-batches, against its formula on one example at a time, in
float64 to 1e-10 (SFTMix itself, by tokens: test_step.py)."""

import pytest
import torch
import torch.nn.functional as F

from sftmix.components import DFT, IRDRO, DecomposedMixup, LabelSmoothing, MixupOnly, SFTMix
from tests.toy import VOCABULARY, toy_model
from tests.training.test_step import DATA, UNITS, Exact, assert_same, nll, ours, response, value_and_gradients

PAIRS = [tuple(slot.row for slot in unit) for unit in UNITS if len(unit) == 2]
TRAINED = [slot.row for unit in UNITS for slot in unit if slot.ntp_weight]
CUTS = [(1, 12), (1, 4), (2, 4), (2, 2), (8, 2)]
"""World sizes and micro-batch sizes; with eight ranks some have no work and get a filler without weight."""


class Rows:
    """Logits [n, V] and labels [n] of the response tokens of every row, and the NLL [n] of each trained one."""

    def __init__(self, model, lambdas: dict) -> None:
        head = model.get_output_embeddings().weight
        self.z, self.y = [], []
        for row in DATA:
            hidden, labels, _ = response(model, row)
            self.z.append(hidden @ head.T)
            self.y.append(labels)
        self.lambdas = lambdas

    def nll(self, row: int) -> torch.Tensor:
        return nll(self.z[row], self.y[row])

    @property
    def trained(self) -> list[torch.Tensor]:
        return [self.nll(row) for row in TRAINED]

    def mixed(self, objective: SFTMix) -> list[torch.Tensor]:
        """The f64[n] of each pair: the soft labels' cross entropy of mixed logits, or of its control."""
        found = []
        for c, u in PAIRS:
            lam = torch.tensor(self.lambdas[DATA[c].id, DATA[u].id], dtype=torch.float64)
            n, share = len(lam), lam[:, None]
            assert n == min(len(self.y[c]), len(self.y[u]))
            if isinstance(objective, DecomposedMixup):
                found.append(lam * self.nll(c)[:n] + (1 - lam) * self.nll(u)[:n])
                continue
            logp = torch.log_softmax(share * self.z[c][:n] + (1 - share) * self.z[u][:n], -1)
            soft = share * F.one_hot(self.y[c][:n], VOCABULARY) + (1 - share) * F.one_hot(self.y[u][:n], VOCABULARY)
            found.append(-(soft * logp).sum(-1))
        return found


def mixing(objective: SFTMix, rows: Rows) -> torch.Tensor:
    trained, mixed = rows.trained, rows.mixed(objective)
    if objective.mean == "sequence":
        trained, mixed = ([one.mean()[None] for one in terms] for terms in (trained, mixed))
    ntp, flat = torch.cat(trained), torch.cat(mixed)
    if isinstance(objective, MixupOnly):
        return flat.mean()
    return ntp.mean() + objective.mu * flat.sum() / len(flat if objective.mixup_mean == "own" else ntp)


def irdro(objective: IRDRO, rows: Rows) -> torch.Tensor:
    """The weights are those of the whole global batch, and detached."""
    losses = torch.stack([nll.mean() for nll in rows.trained])
    weights = torch.softmax(losses.detach() / objective.tau, 0)
    assert weights.max() > 2 * weights.min()
    return (weights * losses).sum()


def dft(objective: DFT, rows: Rows) -> torch.Tensor:
    nll = torch.cat(rows.trained)
    return ((-nll.detach()).exp() * nll).mean()


def label_smoothing(objective: LabelSmoothing, rows: Rows) -> torch.Tensor:
    logits, labels = (torch.cat([x[row] for row in TRAINED]) for x in (rows.z, rows.y))
    return F.cross_entropy(logits, labels, label_smoothing=0.2)


MEANS = [{"lambda_per": "token", "mean": mean} for mean in ("token", "sequence")]
FORMULAS = [
    *(
        (cls(mu=0.75, mixup_mean=m, **mean), mixing)
        for cls in (SFTMix, DecomposedMixup)
        for m in ("own", "ntp")
        for mean in MEANS
    ),
    *((MixupOnly(**mean), mixing) for mean in MEANS),
    *((IRDRO(tau=tau), irdro) for tau in (0.5, 1.0)),
    (DFT(), dft),
    (LabelSmoothing(epsilon=0.2), label_smoothing),
]


@pytest.mark.parametrize(("world", "micro"), CUTS)
@pytest.mark.parametrize(("objective", "formula"), FORMULAS, ids=lambda x: x.__class__.__name__)
def test_a_global_batch_cut_up_is_the_formula(objective, formula, world, micro):
    model, lambdas = toy_model(), {}
    found = ours(model, Exact(objective=objective, seen=lambdas), UNITS, world=world, micro=micro, segments=1)
    assert_same(found, value_and_gradients(model, formula(objective, Rows(model, lambdas))))
