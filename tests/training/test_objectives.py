"""Objectives against the formulas of their papers on one example at a time, in float64 to 1e-10, cut into ranks and
micro-batches (SFTMix itself, by tokens: test_step.py)."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sftmix.batches.collate import collate
from sftmix.components import (
    ASFT,
    DFT,
    EAFT,
    IRDRO,
    NTP,
    DecomposedMixup,
    EmbeddingMixup,
    LabelSmoothing,
    MixupOnly,
    Need,
    PriFT,
    ProFit,
    Rho1,
    SFTMix,
)
from sftmix.components.plans import with_prompts
from sftmix.disk.tables import write_dynamics
from sftmix.testing import check_objective
from sftmix.types import BatchNLL, TrainingDynamics
from sftmix.words.errors import ConfigError, DataError
from tests.components.examples import EXAMPLES, TailSFT
from tests.fast import some_fast
from tests.toy import VOCABULARY, toy_model
from tests.training.test_step import (
    DATA,
    UNITS,
    Exact,
    assert_same,
    naive,
    nll,
    one_step,
    ours,
    response,
    value_and_gradients,
)

CUTS = [{}, {"world": 3, "micro": 2}, {"world": 2, "padding_free": True}]


def dynamics_of(data, seed=0) -> TrainingDynamics:
    """Two checkpoints with random NLLs that float16 can hold."""
    rng = np.random.default_rng(seed)
    sizes = np.array([int(row.target[1:].sum()) for row in data])
    tokens = [rng.gamma(2, 2, (2, size)).astype("f2").astype("f4") for size in sizes]
    sums = np.array([nll.sum(axis=1) for nll in tokens], dtype=float)
    return TrainingDynamics(
        [row.id for row in data], np.array([0, 9]), sums, sizes, np.zeros((len(sizes), 2), int), tokens
    )


REFERENCE = dynamics_of(DATA)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("reference") / "dynamics.parquet"
    write_dynamics(file, REFERENCE)
    return str(file)


def reference(row: int, checkpoint: int) -> torch.Tensor:
    return torch.from_numpy(REFERENCE.token_nll[row][checkpoint]).double()


def profit(row, logits, y):
    return ((-nll(logits, y)).exp() > 0.02).double(), torch.ones(len(y))


def eaft(row, logits, y):
    entropies = []
    for line in torch.softmax(logits, -1).tolist():
        top = sorted(line)[-20:]
        entropies.append(-sum(p / sum(top) * math.log(p / sum(top)) for p in top) / math.log(20))
    return torch.tensor(entropies, dtype=torch.float64), torch.ones(len(y))


def prift(row, logits, y):
    return (-reference(row, 0)).exp(), torch.ones(len(y))


def rho1(row, logits, y):
    excess = (nll(logits, y) - reference(row, 1)).tolist()
    largest = sorted(range(len(y)), key=lambda t: -excess[t])[: math.ceil(0.6 * len(y) - 1e-9)]
    chosen = torch.tensor([float(t in largest) for t in range(len(y))], dtype=torch.float64)
    return chosen, chosen


FORMULAS = {
    "ProFit": (lambda path, **more: ProFit(threshold=0.02, **more), profit),
    "EAFT": (lambda path, **more: EAFT(**more), eaft),
    "PriFT": (lambda path, **more: PriFT(dynamics=path, **more), prift),
    "Rho1": (lambda path, **more: Rho1(dynamics=path, **more), rho1),
}


@pytest.mark.parametrize("mu", [0.0, 0.75])
@pytest.mark.parametrize("cut", some_fast(CUTS, every=3), ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_global_batch_cut_up_is_the_formula(model, path, name, cut, mu):
    make, factor = FORMULAS[name]
    objective, lambdas = make(path, mixup=SFTMix(mu=mu) if mu else None), {}
    assert (Need.PAIRS in objective.needs) is (mu > 0)
    found = ours(model, Exact(objective=objective, seen=lambdas), UNITS, **cut)
    assert_same(found, naive(model, DATA, UNITS, lambdas, mu=mu, mixup_mean="own", factor=factor))


@pytest.mark.parametrize("options", [{"mean": "sequence"}, {"ntp_on": "confident"}, {}], ids=str)
def test_the_count_is_of_the_weights_of_the_trained_tokens(path, options):
    """Three fifths of each response, rounded up, each token with the weight that it has under the inner objective."""
    batch, at = collate(UNITS, DATA), {"step": 1, "total_steps": 2, "seed": 0}
    batch = replace(batch, group=torch.arange(len(batch.ids)) % 2, n_groups=2)
    inner = SFTMix(**options)
    weights = inner.plan(batch, **at).row_weight.tolist()
    of_responses: dict[int, list[float]] = {}
    for weight, slot in zip(weights, batch.slot.tolist(), strict=True):
        of_responses.setdefault(slot, []).append(weight)
    expected = sum(sum(each[: math.ceil(0.6 * len(each) - 1e-9)]) for each in of_responses.values())
    plan = Rho1(dynamics=path, mixup=inner).plan(batch, **at)
    assert plan.ntp_count == pytest.approx(expected, rel=1e-6)
    assert float(plan.row_weight.double().sum()) == pytest.approx(expected, rel=1e-6), "so that `ntp` is a mean"


class Prompted(NTP):
    """Tokens of prompts weigh a quarter, and each of them counts."""

    needs = frozenset({Need.PROMPTS})

    def plan(self, batch, **at):
        return with_prompts(super().plan(batch, **at), batch, 0.25)


def test_tokens_of_prompts_count_beside_the_trained_tokens(path):
    """The count of an inner objective that weighs prompts was replaced by that of the responses alone."""
    batch = collate(UNITS, DATA, prompts=True)
    prompts = float(batch.ntp_weight[batch.prompt.slot].sum())
    weights = zip(batch.ntp_weight.tolist(), batch.n_tokens.tolist(), strict=True)
    kept = sum(weight * math.ceil(0.6 * size - 1e-9) for weight, size in weights)
    plan = Rho1(dynamics=path, mixup=Prompted()).plan(batch, step=1, total_steps=2, seed=0)
    assert prompts > 0
    assert plan.ntp_count == pytest.approx(kept + prompts, rel=1e-6)


def test_the_examples_that_have_fallen_most_are_left_out(model, path):
    """G = 9 examples, of which round(0.5 x 9) = 4 are left out."""
    rows = [slot.row for unit in UNITS for slot in unit if slot.ntp_weight]
    means = {}

    def noted(row, logits, y):
        means[row] = float(nll(logits, y).mean())
        return torch.ones(len(y)), torch.ones(len(y))

    naive(model, DATA, UNITS, {}, mu=0, mixup_mean="own", factor=noted)
    fallen = {row: float(reference(row, 0).mean()) - means[row] for row in rows}
    stay = sorted(rows, key=lambda row: fallen[row])[:5]
    size = {row: len(REFERENCE.token_nll[row][0]) for row in rows}
    expected = sum(means[row] * size[row] for row in stay) / sum(size[row] for row in stay)
    done = one_step(model, TailSFT(dynamics=path), rate=0.125)
    assert done.loss == pytest.approx(expected, rel=1e-6)
    assert done.counts.ntp == sum(size[row] for row in stay)
    assert Need.BATCH_NLL in TailSFT(dynamics=path).needs


def test_before_the_first_step_the_rounding_of_a_forward_chooses_no_examples(path):
    """All have fallen by nothing then; cut in other micro-batches, a forward rounds in another way."""
    rows = sorted({slot.row for unit in UNITS for slot in unit})
    ids = [DATA[row].id for row in rows]
    stored = torch.tensor([float(reference(row, 0).double().sum()) for row in rows], dtype=torch.float64)
    tokens = torch.tensor([len(reference(row, 0)) for row in rows])

    def trained(noise):
        nll = BatchNLL(torch.tensor(rows), stored * (1 + noise), tokens, ids)
        batch = replace(collate(UNITS, DATA), batch_nll=nll)
        weight = TailSFT(dynamics=path).plan(batch, step=0, total_steps=3, seed=0).row_weight
        return {batch.ids[slot] for slot in batch.slot[weight > 0].tolist()}

    noise = torch.linspace(-1, 1, len(rows)) * 1e-6
    assert trained(noise) == trained(-noise) == set(sorted(ids)[round(0.5 * len(ids)) :])


@pytest.mark.parametrize("cls", some_fast([PriFT, Rho1, TailSFT], every=3))
def test_they_keep_the_contract_of_an_objective(cls, tmp_path):
    from sftmix.testing.objectives import _DATA

    write_dynamics(tmp_path / "dynamics.parquet", dynamics_of(_DATA))
    for mixup in (None, SFTMix(), EmbeddingMixup()):
        objective = cls(dynamics=str(tmp_path / "dynamics.parquet"), mixup=mixup)
        check_objective(objective, finite_differences=cls in (PriFT, TailSFT))


def test_a_file_that_does_not_fit_is_named(path, tmp_path):
    with pytest.raises(DataError, match=r"objective\.dynamics: .*nothing\.parquet: there is no such file"):
        PriFT(dynamics=str(tmp_path / "nothing.parquet")).files()
    write_dynamics(tmp_path / "plain.parquet", replace(REFERENCE, token_nll=None))
    with pytest.raises(DataError, match=r"has no NLL of tokens; write it with --reference\.token_nll true"):
        PriFT(dynamics=str(tmp_path / "plain.parquet")).reference_nll(collate(UNITS, DATA))
    for wrong in (-0.1, 0, 1.0):
        with pytest.raises(ConfigError, match=rf"objective\.share is {wrong}; allowed: above 0 and below 1"):
            Rho1(dynamics=path, share=wrong)
    at = {"packed": False, "layers": 2, "vocabulary": VOCABULARY, "total_steps": 3}
    sizes = {row.id: int(row.target[1:].sum()) for row in DATA}
    PriFT(dynamics=path, mixup=SFTMix()).check(sizes, **at)
    with pytest.raises(ConfigError, match=r"other tokens for 2 of 12 examples, such as example-3: \d of 0 .*\(0: not"):
        PriFT(dynamics=path).check({**sizes, "example-3": 0, "new": 4}, **at)
    with pytest.raises(DataError, match="has no NLL of tokens"):
        PriFT(dynamics=str(tmp_path / "plain.parquet")).check(sizes, **at)
    TailSFT(dynamics=str(tmp_path / "plain.parquet")).check(sizes, **at)
    for steps, trained in (([1, 2], False), ([5, 9], True)):
        write_dynamics(tmp_path / "later.parquet", replace(REFERENCE, steps=np.array(steps)))
        told = pytest.raises(ConfigError, match=r"is of step 5 of a training.*checkpoints '\[0, 1\]'")
        with told if trained else contextlib.nullcontext():
            PriFT(dynamics=str(tmp_path / "later.parquet")).check(sizes, **at)
    with pytest.raises(ConfigError, match=r"objective\.kl is -1"):
        ASFT(kl=-1.0)


# ----------------------------------------------------------------------------------------- objectives of other losses

PAIRS = [tuple(slot.row for slot in unit) for unit in UNITS if len(unit) == 2]
TRAINED = [slot.row for unit in UNITS for slot in unit if slot.ntp_weight]
WORLDS = [(1, 12), (1, 4), (2, 4), (2, 2), (8, 2)]
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
LOSSES = [
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


@pytest.mark.parametrize(("world", "micro"), some_fast(WORLDS, every=3))
@pytest.mark.parametrize(("objective", "formula"), LOSSES, ids=lambda x: x.__class__.__name__)
def test_another_loss_of_a_global_batch_cut_up_is_the_formula(objective, formula, world, micro):
    model, lambdas = toy_model(), {}
    found = ours(model, Exact(objective=objective, seen=lambdas), UNITS, world=world, micro=micro, segments=1)
    assert_same(found, value_and_gradients(model, formula(objective, Rows(model, lambdas))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PriFT", "Rho1", "tail_sft.TailSFT"])
def test_a_run_trains_by_a_stored_reference(name, finished, sftmix, tmp_path, monkeypatch):
    """Its start measures the memory of a step on a row that is cut short, which has the last of the stored tokens."""
    monkeypatch.syspath_prepend(EXAMPLES)
    shown = ["--model.path", str(finished.tiny.model), "--data.train", str(finished.tiny.train)]
    small = ["--training.max_steps", "2", "--checkpoint.every", "0"]
    reference = tmp_path / "reference"
    keeps = ["--reference.token_nll", "true", "--reference.checkpoints", "[0, 1]"]
    assert sftmix("confidence", *shown, *small, *keeps, "--out", str(reference)).code == 0
    stored = ["--objective", name, "--objective.dynamics", str(reference / "confidence" / "dynamics.parquet")]
    done = sftmix("run", *shown, *small, *stored, "--out", str(tmp_path / "run"))
    assert done.code == 0, done.err
