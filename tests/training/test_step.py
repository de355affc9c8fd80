"""One global batch, cut up in whatever way, has the gradient of the formula computed naively on one example after the
other:  sum NLL / NTP tokens + mu sum Mixup / (Mixup or NTP) tokens  (T1, T2, T9, T11, T28)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, Unit
from sftmix.components import (
    IRDRO,
    NTP,
    CutMix,
    DecomposedMixup,
    EmbeddingMixup,
    ManifoldMixup,
    MixtureDivergence,
    Need,
    SFTMix,
    SoftLabels,
)
from sftmix.components.base import Objective
from sftmix.components.contracts import check_loss, check_plan
from sftmix.components.plans import with_prompts
from sftmix.components.view import Taught
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.testing.strategies import RowsInMemory
from sftmix.training.metrics import Totals
from sftmix.training.module import TrainingModule
from sftmix.training.scoring import with_batch_nll
from sftmix.training.step import StepResult, normalise, prepare_step, train_step
from sftmix.training.update import clip_gradients, gradient_norm, gradient_shards
from sftmix.types import Encoded, Plan
from tests.batches.test_deal import dealt
from tests.fast import some_fast
from tests.toy import ToyRows, toy_rows, toy_setup

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 1), (6, 8), (2, 2), (3, 17)])
WEIGHTS = [2.0, 0.5, 1.0, 3.0, 0.25, 1.0, 7.0, 0.5, 1.5, 1.0, 1.0]
"""Of the responses of DATA; the first token of each weighs twice as much."""
WEIGHTED = RowsInMemory(
    [
        replace(row, weight=weight * np.where(np.arange(len(row.target)) == np.argmax(row.target), 2, 1).astype("f4"))
        for row, weight in zip(DATA, WEIGHTS, strict=True)
    ]
)
UNITS: list[Unit] = [
    (Slot(0), Slot(1)),
    (Slot(2), Slot(3)),
    (Slot(4), Slot(5)),
    (Slot(6), Slot(2, 0.0)),  # a repeat: mixed again, without NTP
    (Slot(7),),
    (Slot(8),),
]
STEP = 3


class Exact(Objective):
    """An objective whose weights are divided in float64, and whose lambdas the test reads off, by the pair's ids."""

    def __init__(self, *, objective: Objective, seen: dict) -> None:
        self.objective, self.seen, self.needs = objective, seen, objective.needs

    def plan(self, batch, *, step, total_steps, seed) -> Plan:
        plan = self.objective.plan(batch, step=step, total_steps=total_steps, seed=seed)
        for m, pair in enumerate(batch.pair_index.tolist() if len(plan.lam) else []):
            c, u = batch.slot_pairs[pair].tolist()
            self.seen.setdefault((batch.ids[c], batch.ids[u]), []).append(float(plan.lam[m]))
        row, pair, lam = (x.double() for x in (plan.row_weight, plan.pair_weight, plan.lam))
        asked = None if plan.prompt_weight is None else plan.prompt_weight.double()
        return replace(plan, row_weight=row, pair_weight=pair, lam=lam, prompt_weight=asked)

    def loss(self, view, batch, plan):
        return self.objective.loss(view, batch, plan)


def take_gradients(model) -> dict[str, torch.Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def ours(
    model,
    objective: Objective,
    units: list[Unit],
    *,
    world: int = 1,
    micro: int | None = 4,
    segments: int = 2,
    tokens: int | None = None,
    padding_free: bool = False,
    data: ToyRows = DATA,
    teacher=None,
):
    """Loss and gradients, by the parts that the loop calls; ranks one after the other, averaged as by DDP."""
    module = TrainingModule(model)
    options = {"micro_batch_size": micro, "micro_batch_tokens": tokens, "length_groups": segments}
    steps = dealt(units, data.lengths, ranks=world, padding_free=padding_free, **options)
    batches = [
        collate(rank, data, n_segments=s.n_segments, padding_free=padding_free, prompts=Need.PROMPTS in objective.needs)
        for s in steps
        for rank in s.ranks
    ]
    if Need.BATCH_NLL in objective.needs:
        batches = with_batch_nll(batches, data.ids, module, World(), "fp32")
    plans = [check_plan(objective, objective.plan(b, step=STEP, total_steps=9, seed=5), b) for b in batches]
    ntp, mixup = sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans)
    total = 0.0
    for batch, plan in zip(batches, plans, strict=True):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=world)
        second = teacher and TrainingModule(teacher)
        taught = second and Taught(second.hidden_states(batch).detach(), **second.head.copied())
        out = module(batch, scaled, loss=objective.loss, teacher=taught)
        check_loss(objective, out, scaled)
        (out.loss / world).backward()
        total += float(out.loss.detach()) / world
    return total, take_gradients(model)


def response(model, row: Encoded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states [T, D] before, labels [T] and weights [T]) of the response tokens of a row, which stands alone."""
    ids = torch.from_numpy(row.input_ids)
    hidden = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    at = np.flatnonzero(row.target)
    at = at[at > 0]
    return hidden[at - 1], ids[at], torch.ones(len(at)) if row.weight is None else torch.from_numpy(row.weight[at])


def nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels]


def naive(model, data: ToyRows, units: list[Unit], lambdas: dict, *, mu: float, mixup_mean: str, factor=None, mix=None):
    """The formula, an example at a time: no padding, no chunks, hidden states mixed and multiplied by the head.

    factor  (row, logits, labels) -> the factors of the tokens' NLL, and what each token adds to the NTP count
    mix     (row c, row u, lambdas [n]) -> the sum of another Mixup term over n tokens
    """
    head = model.get_output_embeddings().weight

    def mixture(c: int, u: int, lam: torch.Tensor) -> torch.Tensor:
        n = len(lam)
        (z_c, y_c, w_c), (z_u, y_u, w_u) = (response(model, data[row]) for row in (c, u))
        logits = (lam[:, None] * z_c[:n] + (1 - lam[:, None]) * z_u[:n]) @ head.T
        w = lam * w_c[:n] + (1 - lam) * w_u[:n]
        return (w * (lam * nll(logits, y_c[:n]) + (1 - lam) * nll(logits, y_u[:n]))).sum()

    ntp, n_ntp, mixed, n_mixed = torch.zeros(()), 0, torch.zeros(()), 0
    for unit in units:
        weights = []
        for slot in unit:
            z, y, w = response(model, data[slot.row])
            weights.append(w)
            by, counted = (1.0, w) if factor is None else factor(slot.row, (z @ head.T).detach(), y)
            ntp = ntp + slot.ntp_weight * (w * by * nll(z @ head.T, y)).sum()
            n_ntp += slot.ntp_weight * float(counted.sum())
        if len(unit) == 2 and mu:
            c, u = (slot.row for slot in unit)
            n = min(map(len, weights))
            lam = torch.tensor(lambdas[data[c].id, data[u].id], dtype=torch.float64)[:n]
            mixed = mixed + (mix or mixture)(c, u, lam)
            n_mixed += float((lam * weights[0][:n] + (1 - lam) * weights[1][:n]).sum())
    divisor = n_ntp if mixup_mean == "ntp" else n_mixed
    loss = (ntp / n_ntp if n_ntp else 0 * ntp) + (mu * mixed / divisor if divisor else 0 * mixed)
    return value_and_gradients(model, loss)


def value_and_gradients(model, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    loss.backward()
    return float(loss.detach()), take_gradients(model)


def assert_same(left, right) -> None:
    assert left[0] == pytest.approx(right[0], abs=1e-12)
    for name, expected in right[1].items():
        torch.testing.assert_close(left[1][name], expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


CUTS = [
    *({"world": w, "micro": m, "segments": s} for w, m, s in [(1, 12, 1), (1, 2, 1), (2, 4, 2), (2, 6, 4), (8, 2, 1)]),
    *({"micro": None, "tokens": 30, "world": world, "segments": 4} for world in (1, 2)),
    {"micro": None, "tokens": 1},
    {"micro": None, "tokens": 25, "world": 3, "padding_free": True},
    {"micro": 12, "padding_free": True},
]
"""Among them token budgets, and rows without padding, whose positions start again."""


@pytest.mark.parametrize("cut", some_fast(CUTS, every=3), ids=str)
@pytest.mark.parametrize(
    ("data", "mixup_mean", "lambda_per"),
    [(DATA, "own", "pair"), (WEIGHTED, "ntp", "token"), (WEIGHTED, "own", "pair")],
    ids=["plain", "weighted ntp", "weighted own"],
)
def test_a_global_batch_cut_up_is_the_formula(model, data, cut, mixup_mean, lambda_per):
    """Weights of rows multiply both terms and their counts."""
    lambdas: dict = {}
    objective = Exact(objective=SFTMix(mu=0.75, mixup_mean=mixup_mean, lambda_per=lambda_per), seen=lambdas)
    found = ours(model, objective, UNITS, data=data, **cut)
    assert_same(found, naive(model, data, UNITS, lambdas, mu=0.75, mixup_mean=mixup_mean))


def test_a_short_last_batch_divides_by_its_own_counts(model):
    """T1: the last global batch of an epoch holds a pair and a single, where the one before holds three pairs. And
    where all slots are repeats, the NTP count is 0, nothing is divided by it, and only Mixup is left."""
    batches = [UNITS[:3], UNITS[3:5]]
    assert [sum(map(len, b)) for b in batches] == [6, 3]
    for units in [*batches, [(Slot(0, 0.0), Slot(1, 0.0)), (Slot(2, 0.0), Slot(3, 0.0))]]:
        lambdas: dict = {}
        found = ours(model, Exact(objective=SFTMix(mu=0.5), seen=lambdas), units, world=2, micro=2)
        expected = naive(model, DATA, units, lambdas, mu=0.5, mixup_mean="own")
        assert_same(found, expected)
        assert any(g.abs().max() > 1e-3 for g in expected[1].values())


def test_ranks_without_work_get_a_filler_without_weight(model):
    """Seven of eight ranks repeat the only unit with weight 0: the gradient is still that of the one example (T11)."""
    units: list[Unit] = [(Slot(7),)]
    steps = dealt(units, DATA.lengths, ranks=8, micro_batch_size=2, length_groups=2)
    assert [len(rank) for rank in steps[0].ranks] == [1] * 8
    for objective in (Exact(objective=o, seen={}) for o in (NTP(), SFTMix(mu=0.5))):
        found = ours(model, objective, units, world=8, micro=2)
        assert_same(found, naive(model, DATA, units, {}, mu=0.0, mixup_mean="own"))
    assert any(g.abs().max() > 1e-3 for g in found[1].values())


def one_step(
    model, objective: Objective, *, rate: float, units: Sequence[Unit] = UNITS, optimizer=None, data=DATA
) -> StepResult:
    """The whole of a step as the loop calls it: SGD, two micro-batches and more."""
    options = TrainingOptions(
        learning_rate=rate, warmup_ratio=0.0, schedule="constant", max_grad_norm=0.0, micro_batch_size=4
    )
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=123.0)
    setup = toy_setup(TrainingModule(model), optimizer=optimizer, data=data, objective=objective, options=options)
    return train_step(setup, prepare_step(setup, STEP, units, None))


def test_a_step_moves_the_weights_against_the_gradient_at_the_rate_of_the_schedule(model):
    before, lambdas = {name: p.detach().clone() for name, p in model.named_parameters()}, {}
    done = one_step(model, Exact(objective=SFTMix(mu=0.75), seen=lambdas), rate=0.125)
    moved = {name: (before[name] - p.detach()) / 0.125 for name, p in model.named_parameters()}
    model.load_state_dict(before, strict=False)
    assert_same((done.loss, moved), naive(model, DATA, UNITS, lambdas, mu=0.75, mixup_mean="own"))


@pytest.mark.parametrize(
    "objective",
    [
        *(cls(mu=0.75) for cls in (SFTMix, DecomposedMixup, EmbeddingMixup, CutMix, SoftLabels, MixtureDivergence)),
        ManifoldMixup(mu=0.75, layers=1),
        *(SFTMix(mu=0.75, mixup_mean="ntp", mean=mean) for mean in ("token", "sequence")),
        SFTMix(mu=0.75, mean="sequence"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_the_losses_of_the_log_add_up_to_the_loss(model, objective):
    """loss = NTP term + mu Mixup, or mu times N_mix / N_ntp of it, as the log tells them apart."""
    done = one_step(model, objective, rate=0.125)
    share = done.counts.mixup / done.counts.ntp if objective.mixup_mean == "ntp" else 1
    assert done.loss == pytest.approx(done.ntp_loss + 0.75 * done.mixup * share, rel=1e-6)
    assert done.mixup > 1e-3


@pytest.mark.parametrize("objective", [NTP(), SFTMix(mu=0.75, mean="sequence")])
def test_ntp_of_the_log_is_the_mean_nll_whatever_the_weights(model, objective):
    """Once with the weights of rows, once with means of responses; the weighted term is a column of its own."""
    head, found = model.get_output_embeddings().weight, []
    with torch.no_grad():
        for z, y, w in (response(model, row) for row in WEIGHTED):
            found.append((nll(z @ head.T, y), w))
    rows = [slot.row for unit in UNITS for slot in unit if slot.ntp_weight]
    mean = float(torch.cat([found[row][0][found[row][1] > 0] for row in rows]).mean())
    weights = [found[row][1] / (1 if isinstance(objective, NTP) else len(found[row][1])) for row in rows]
    count = sum(float(w.sum()) for w in weights)
    weighted = sum(float((w * found[row][0]).sum()) for row, w in zip(rows, weights, strict=True)) / count
    done = one_step(model, objective, rate=0.0, data=WEIGHTED)
    assert (done.ntp, done.ntp_loss) == pytest.approx((mean, weighted), rel=1e-6)
    assert abs(mean - weighted) > 1e-3


class Asked(SFTMix):
    """SFTMix whose prompts weigh 0.25."""

    needs = frozenset({Need.PAIRS, Need.PROMPTS})

    def __init__(self, *, divided_by: str) -> None:
        super().__init__(mu=0.75)
        self.divided_by = divided_by

    def plan(self, batch, **at) -> Plan:
        return with_prompts(super().plan(batch, **at), batch, 0.25, divided_by=self.divided_by)


@pytest.mark.parametrize("cut", [{}, {"world": 3, "micro": 2}, {"micro": 12, "padding_free": True}], ids=str)
@pytest.mark.parametrize(("divided_by", "share"), [("tokens", 1.0), ("weights", 0.25), ("response", 0.0)])
def test_weights_of_prompts_join_those_of_rows(model, cut, divided_by, share):
    """Beside the formula of the responses, a term of each example's other tokens, by the model's own logits."""
    rows = [slot.row for unit in UNITS for slot in unit if slot.ntp_weight]
    plain, total, asked = sum(int(DATA[row].target[1:].sum()) for row in rows), torch.zeros(()), 0
    for row in rows:
        ids, target = torch.from_numpy(DATA[row].input_ids), torch.from_numpy(DATA[row].target[1:])
        total = total + nll(model(input_ids=ids[None]).logits[0, :-1], ids[1:])[~target].sum()
        asked += int((~target).sum())
    seen: dict = {}
    loss, found = ours(model, Exact(objective=Asked(divided_by=divided_by), seen=seen), UNITS, **cut)
    mixed, of_mixed = naive(model, DATA, UNITS, seen, mu=0.75, mixup_mean="own")
    ntp, of_ntp = naive(model, DATA, UNITS, {}, mu=0.0, mixup_mean="own")
    count = plain + share * asked
    expected = mixed - ntp + (ntp * plain + 0.25 * float(total.detach())) / count
    total.backward()
    of_asked = take_gradients(model)
    slopes = {k: of_mixed[k] - of_ntp[k] + (of_ntp[k] * plain + 0.25 * of_asked[k]) / count for k in of_ntp}
    assert_same((loss, found), (expected, slopes))


def test_prompts_are_in_the_weighted_term_of_the_log_alone(model):
    done, plain = (one_step(model, one, rate=0.0) for one in (Asked(divided_by="tokens"), SFTMix(mu=0.75)))
    assert done.loss == pytest.approx(done.ntp_loss + 0.75 * done.mixup, rel=1e-6)
    assert (done.ntp, done.ntp_tokens, done.mixup) == (plain.ntp, plain.ntp_tokens, plain.mixup)
    assert done.counts.ntp > plain.counts.ntp


def test_the_first_token_of_a_document_is_predicted_by_nothing():
    packed = replace(DATA[2], starts=np.array([0, 4]))
    prompt = collate([(Slot(0),)], RowsInMemory([packed]), prompts=True).prompt
    places = [t for t in range(len(packed.input_ids)) if t not in (0, 4) and not packed.target[t]]
    assert prompt.labels.tolist() == packed.input_ids[places].tolist()
    assert prompt.slot.tolist() == [0] * len(places)


def test_mu_effective_where_mixup_is_divided_by_the_ntp_tokens(model):
    """It is mu itself; of several steps, its mean over what they mixed."""
    totals = Totals()
    for mu in (0.75, 0.25):
        done = one_step(model, SFTMix(mu=mu, mixup_mean="ntp"), rate=0.0)
        assert totals.add(done, tokens=9, examples=9, seconds=1.0)["mu_effective"] == mu
    assert totals.figures()["mu_effective"] == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("objective", [NTP(), IRDRO(), IRDRO(tau=1e-3)])
def test_a_step_without_a_finite_gradient_moves_nothing(model, objective):
    model.get_input_embeddings().weight.data[int(DATA[7].input_ids[0])] = float("inf")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = one_step(model, objective, rate=0.125)
    assert done.skipped
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("objective", "mixed"), [(NTP(), 0), (IRDRO(), 0), (SFTMix(mu=0), 0), (SFTMix(mixup_mean="ntp"), 3)]
)
def test_a_step_in_which_no_token_counts_moves_nothing(model, objective, mixed):
    """Of repeats alone NTP trains nothing; AdamW would go on with what it remembers, and decay."""
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    done = one_step(model, objective, rate=0.125, optimizer=adamw)
    assert done.counts.ntp > 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    repeats: list[Unit] = [(Slot(6, 0.0), Slot(2, 0.0))]
    done = one_step(model, objective, rate=0.125, units=repeats, optimizer=adamw)
    assert (done.counts.ntp, done.counts.mixup, done.loss, done.skipped) == (0, mixed, 0, False)
    assert Totals().add(done, tokens=9, examples=9, seconds=1.0)["mu_effective"] == 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_norm_of_a_million_gradients_is_exact_in_float32():
    """Summed in float32, it is off by some 1e-5 on a CPU."""
    model = torch.nn.ParameterList([torch.zeros(1000, 1000), torch.zeros(77)])
    for number, p in enumerate(model):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    exact = math.sqrt(math.fsum(x * x for p in model for x in p.grad.flatten().tolist()))
    before = [p.grad.clone() for p in model]
    shards = gradient_shards(model)
    norm = gradient_norm(model, shards)
    assert norm == float(np.float32(exact))
    clip_gradients(shards, norm, 0.0)
    assert all(torch.equal(p.grad, was) for p, was in zip(model, before, strict=True))
    clip_gradients(shards, norm, 2.0)
    for p, was in zip(model, before, strict=True):
        torch.testing.assert_close(p.grad, was * (2.0 / exact), rtol=1e-6, atol=0)
