"""Objectives that mix elsewhere, against their formula on one pair at a time: no padding, no hooks, no chunks.

In float64 on a GPT-2, through plans, counts, the module and both layouts, cut into ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sftmix.batches.collate import collate
from sftmix.batches.deal import micro_steps
from sftmix.batches.order import Slot, Unit
from sftmix.common.errors import ConfigError
from sftmix.components import CutMix, EmbeddingMixup, ManifoldMixup, MixtureDivergence
from sftmix.components.contracts import check_loss, check_plan
from sftmix.components.view import LossView
from sftmix.model.layers import recompute_activations
from sftmix.testing import rows_in_memory
from sftmix.testing.strategies import RowsInMemory
from sftmix.training.module import TrainingModule
from sftmix.training.step import normalise
from tests.toy import toy_model

DATA = rows_in_memory([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 1), (6, 8), (2, 2)])
UNITS: list[Unit] = [
    (Slot(0), Slot(1)),
    (Slot(2), Slot(3)),
    (Slot(4), Slot(5)),
    (Slot(6), Slot(2, 0.0)),  # a repeat: mixed again, without NTP
    (Slot(7),),
    (Slot(8),),
]
MU, AT = 0.75, {"step": 3, "total_steps": 9, "seed": 5}
CUTS = [(1, 12, 1, False), (1, 4, 2, False), (2, 2, 1, False), (3, 2, 1, False), (8, 2, 1, False), (2, 4, 1, True)]
"""World size, micro-batch size, segments, padding-free; some ranks and micro-batches have no pair."""


class Case:
    """The plans of a global batch, in float64, and what a test reads off them: lambda and swapped tokens of a pair."""

    def __init__(self, objective, world=1, micro=12, segments=1, padding_free=False, data: RowsInMemory = DATA):
        steps = micro_steps(
            UNITS,
            data.lengths,
            world_size=world,
            micro_batch_size=micro,
            max_segments=segments,
            padding_free=padding_free,
        )
        self.objective, self.world = objective, world
        self.batches = [
            collate(rank, data, n_segments=s.n_segments, padding_free=padding_free) for s in steps for rank in s.ranks
        ]
        self.plans, self.lam, self.swapped = [], {}, {}
        for batch in self.batches:
            plan = check_plan(objective, objective.plan(batch, **AT), batch)
            wide = {name: getattr(plan, name).double() for name in ("row_weight", "pair_weight", "lam")}
            self.plans.append(replace(plan, **wide))
            for m, (i, _) in enumerate(plan.pairs.tolist()):
                c, u = next(pair for pair in batch.slot_pairs.tolist() if pair[0] == batch.slot[i])
                ids = batch.ids[c], batch.ids[u]
                self.lam[ids] = float(plan.lam[m])
                if isinstance(objective, CutMix):
                    self.swapped.setdefault(ids, []).append(bool(plan.own[m] != batch.labels[i]))

    def gradients(self, model):
        ntp, mixup = (sum(getattr(plan, name) for plan in self.plans) for name in ("ntp_count", "mixup_count"))
        total, module = 0.0, TrainingModule(model)
        for batch, plan in zip(self.batches, self.plans, strict=True):
            scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=self.world)
            out = module(batch, scaled, loss=self.objective.loss)
            check_loss(self.objective, out, scaled)
            (out.loss / self.world).backward()
            total += float(out.loss.detach()) / self.world
        return total, taken(model)


def taken(model) -> dict[str, torch.Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def run(model, e: torch.Tensor, *, start: int = 0, end: int | None = None) -> torch.Tensor:
    """The layers `start` to `end` of the GPT-2 on states [L, D] of one example; before the first, positions are added,
    and behind the last stands the norm."""
    body = model.transformer
    x = (e + body.wpe.weight[: len(e)] if start == 0 else e)[None]
    for block in body.h[start:end]:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    return (body.ln_f(x) if end is None else x)[0]


def own_way(mine: torch.Tensor, theirs: torch.Tensor, ahead: int, behind: int, lam: float) -> torch.Tensor:
    """Row by row lam mine + (1 - lam) theirs where both have a token; their responses begin at `ahead` and `behind`."""
    rows = []
    for place, row in enumerate(mine):
        partner = place - ahead + behind
        rows.append(lam * row + (1 - lam) * theirs[partner] if 0 <= partner < len(theirs) else row)
    return torch.stack(rows)


def naive(model, case: Case, layer: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the global batch, an example after the other."""
    head, wte = model.get_output_embeddings().weight, model.transformer.wte.weight

    def ce(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(states @ head.T, labels, reduction="sum")

    ntp, tokens, mixup, count = torch.zeros(()), 0, torch.zeros(()), 0
    for unit in UNITS:
        ids = [torch.from_numpy(DATA[slot.row].input_ids) for slot in unit]
        first = [int(np.flatnonzero(DATA[slot.row].target)[0]) for slot in unit]
        for slot, x, begin in zip(unit, ids, first, strict=True):
            if slot.ntp_weight:
                ntp, tokens = ntp + ce(run(model, wte[x])[begin - 1 : -1], x[begin:]), tokens + len(x) - begin
        if len(unit) < 2:
            continue
        key = DATA[unit[0].row].id, DATA[unit[1].row].id
        lam, n = case.lam[key], min(len(x) - begin for x, begin in zip(ids, first, strict=True))
        count += n
        y = [x[begin : begin + n] for x, begin in zip(ids, first, strict=True)]
        if isinstance(case.objective, CutMix):
            swapped = torch.tensor(case.swapped[key])
        for a, b in ((0, 1), (1, 0)):
            at = slice(first[a] - 1, first[a] - 1 + n)
            if isinstance(case.objective, CutMix):
                cut, labels = ids[a].clone(), torch.where(swapped, y[b], y[a])
                cut[first[a] : first[a] + n] = labels
                mixup = mixup + 0.5 * ce(run(model, wte[cut])[at], labels)
                continue
            mine, theirs = (wte[ids[k]] if layer == 0 else run(model, wte[ids[k]], end=layer) for k in (a, b))
            states = run(model, own_way(mine, theirs, first[a], first[b], lam), start=layer)[at]
            mixup = mixup + 0.5 * (lam * ce(states, y[a]) + (1 - lam) * ce(states, y[b]))
    loss = ntp / tokens + MU * mixup / count
    loss.backward()
    return float(loss.detach()), taken(model)


def assert_same(left, right) -> None:
    assert left[0] == pytest.approx(right[0], abs=1e-12)
    for name, expected in right[1].items():
        torch.testing.assert_close(left[1][name], expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return toy_model(tied=request.param)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("objective", "layer"), [(EmbeddingMixup(mu=MU), 0), (ManifoldMixup(mu=MU, layers=1), 1), (CutMix(mu=MU), 0)]
)
def test_a_global_batch_cut_up_is_the_formula(model, objective, layer, cut):
    case = Case(objective, *cut)
    assert_same(case.gradients(model), naive(model, case, layer))


@pytest.mark.parametrize("divergence", ["js", "kl"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_divergence_of_mixtures(model, divergence, cut):
    case = Case(MixtureDivergence(mu=MU, divergence=divergence), *cut)
    found = case.gradients(model)
    head, wte = model.get_output_embeddings().weight, model.transformer.wte.weight
    total, tokens, mixup, count = torch.zeros(()), 0, torch.zeros(()), 0
    for unit in UNITS:
        states = []
        for slot in unit:
            x, begin = torch.from_numpy(DATA[slot.row].input_ids), int(np.flatnonzero(DATA[slot.row].target)[0])
            states.append(run(model, wte[x])[begin - 1 : -1])
            if slot.ntp_weight:
                total = total + F.cross_entropy(states[-1] @ head.T, x[begin:], reduction="sum")
                tokens += len(x) - begin
        if len(unit) == 2:
            lam, n = case.lam[DATA[unit[0].row].id, DATA[unit[1].row].id], min(map(len, states))
            p_i, p_j = (torch.softmax(z[:n] @ head.T, -1) for z in states)
            q = lam * p_i + (1 - lam) * p_j
            p = torch.softmax((lam * states[0][:n] + (1 - lam) * states[1][:n]) @ head.T, -1)
            middle = (q + p) / 2
            js = (F.kl_div(middle.log(), q, reduction="sum") + F.kl_div(middle.log(), p, reduction="sum")) / 2
            mixup = mixup + (js if divergence == "js" else F.kl_div(p.log(), q, reduction="sum"))
            count += n
    loss = total / tokens + MU * mixup / count
    loss.backward()
    assert_same(found, (float(loss.detach()), taken(model)))


def test_the_cut_is_one_stretch_of_the_partners_share():
    case = Case(CutMix())
    for key, swapped in case.swapped.items():
        places = np.flatnonzero(swapped)
        assert len(places) <= round((1 - case.lam[key]) * len(swapped))  # a token may be the partner's already
        assert len(places) < 2 or places[-1] - places[0] < round((1 - case.lam[key]) * len(swapped))
    assert any(any(swapped) and not all(swapped) for swapped in case.swapped.values())


def test_of_several_layers_each_step_draws_one():
    objective = ManifoldMixup(layers=[0, 1, 2])
    batch = collate(UNITS, DATA)
    layers = [objective.plan(batch, step=step, total_steps=30, seed=5).layer for step in range(30)]
    assert {*layers} == {0, 1, 2}
    assert layers == [objective.plan(batch, step=step, total_steps=30, seed=5).layer for step in range(30)]


@pytest.mark.parametrize("cls", [EmbeddingMixup, ManifoldMixup, CutMix, MixtureDivergence])
def test_without_mu_it_is_ntp(cls):
    model = toy_model()
    batch = collate(UNITS, DATA)
    plan = cls(mu=0).plan(batch, **AT)
    module = TrainingModule(model)
    assert torch.equal(module(batch, plan, loss=cls(mu=0).loss).loss, module(batch, plan).loss)


def test_a_layer_that_is_not_there_is_named(model):
    with pytest.raises(ConfigError, match=r"no decoder layer 3; allowed: 1 to 2, and 0"):
        Case(ManifoldMixup(layers=3)).gradients(model)
    recompute_activations(model)
    with pytest.raises(ConfigError, match=r"activation_checkpointing true and a change of the states after layer 1"):
        Case(ManifoldMixup(layers=1)).gradients(model)
    with pytest.raises(ConfigError, match=r"objective\.layers is \[-1\]"):
        ManifoldMixup(layers=[-1])


def test_mixtures_elsewhere_are_not_measured_at_the_head():
    batch = collate(UNITS, DATA)
    plan = EmbeddingMixup().plan(batch, **AT)
    head = SimpleNamespace(weight=torch.ones(61, 4), bias=None, softcap=None, scale=1.0)
    view = LossView(head, lambda: torch.ones(len(batch.labels), 4))
    with pytest.raises(ConfigError, match="callbacks MeasureMixing and an objective that mixes embeddings or states"):
        EmbeddingMixup().loss(view, batch, plan)


def test_packed_documents_are_refused():
    packed = replace(DATA.rows[0], starts=np.array([0, 4]))
    data = RowsInMemory([packed, *DATA.rows[1:]])
    with pytest.raises(ConfigError, match="examples of one document"):
        Case(EmbeddingMixup(), data=data)
