"""Objectives that mix elsewhere, against their formula on one pair at a time: no padding, no hooks, no chunks.

In float64 on a GPT-2, through plans, counts, the module and both layouts, cut into ranks and micro-batches.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from sftmix.batches.collate import collate
from sftmix.components import (
    CutMix,
    EmbeddingMixup,
    Linear,
    ManifoldMixup,
    MixtureDivergence,
    ProFit,
    SFTMix,
    SoftLabels,
)
from sftmix.components.view import LossView
from sftmix.model.layers import recompute_activations
from sftmix.ranks.rng import generator
from sftmix.testing import check_objective
from sftmix.testing.strategies import RowsInMemory
from sftmix.training.module import ModelView, TrainingModule
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.toy import rounding, toy_model
from tests.training.test_step import DATA, STEP, UNITS, Exact, assert_same, naive, nll, ours, response

MU, AT = 0.75, {"step": STEP, "total_steps": 9, "seed": 5}
CUTS = [
    {"micro": 12, "segments": 1},
    {},
    {"world": 2, "micro": 2, "segments": 1},
    {"world": 3, "micro": 2, "segments": 1},
    {"world": 8, "micro": 2, "segments": 1},
    {"world": 2, "padding_free": True},
]
"""Some ranks and micro-batches have no pair."""


class Case(Exact):
    """The objective in float64, and what a test reads off its plans: lambda and swapped tokens of each pair."""

    def __init__(self, objective) -> None:
        super().__init__(objective=objective, seen={})
        self.swapped: dict = {}

    def plan(self, batch, **given):
        plan = super().plan(batch, **given)
        for m, pair in enumerate(batch.pair_index.tolist() if isinstance(self.objective, CutMix) else []):
            c, u = batch.slot_pairs[pair].tolist()
            swapped = bool(plan.own[m] != batch.labels[plan.pairs[m, 0]])
            self.swapped.setdefault((batch.ids[c], batch.ids[u]), []).append(swapped)
        return plan


def through(model, e: torch.Tensor, *, start: int = 0, end: int | None = None) -> torch.Tensor:
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


def mixture_of(model, case: Case, layer: int) -> Callable[[int, int, torch.Tensor], torch.Tensor]:
    """The Mixup term of a pair: both of its halves, in each of which one example is mixed with the other."""
    head, wte = model.get_output_embeddings().weight, model.transformer.wte.weight

    def ce(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nll(states @ head.T, labels).sum()

    def mix(c: int, u: int, lam: torch.Tensor) -> torch.Tensor:
        n, share, total = len(lam), float(lam[0]), torch.zeros(())
        ids = [torch.from_numpy(DATA[row].input_ids) for row in (c, u)]
        first = [int(np.flatnonzero(DATA[row].target)[0]) for row in (c, u)]
        y = [x[begin : begin + n] for x, begin in zip(ids, first, strict=True)]
        for a, b in ((0, 1), (1, 0)):
            at = slice(first[a] - 1, first[a] - 1 + n)
            if isinstance(case.objective, CutMix):
                swapped = torch.tensor(case.swapped[DATA[c].id, DATA[u].id])
                cut, labels = ids[a].clone(), torch.where(swapped, y[b], y[a])
                cut[first[a] : first[a] + n] = labels
                total = total + 0.5 * ce(through(model, wte[cut])[at], labels)
                continue
            mine, theirs = (wte[ids[k]] if layer == 0 else through(model, wte[ids[k]], end=layer) for k in (a, b))
            states = through(model, own_way(mine, theirs, first[a], first[b], share), start=layer)[at]
            total = total + 0.5 * (share * ce(states, y[a]) + (1 - share) * ce(states, y[b]))
        return total

    return mix


@pytest.mark.parametrize("cut", some_fast(CUTS, every=3))
@pytest.mark.parametrize(
    ("objective", "layer"), [(EmbeddingMixup(mu=MU), 0), (ManifoldMixup(mu=MU, layers=1), 1), (CutMix(mu=MU), 0)]
)
def test_a_global_batch_cut_up_is_the_formula(model, objective, layer, cut):
    case = Case(objective)
    found, mix = ours(model, case, UNITS, **cut), mixture_of(model, case, layer)
    assert_same(found, naive(model, DATA, UNITS, case.seen, mu=MU, mixup_mean="own", mix=mix))


@pytest.mark.parametrize("cut", some_fast(CUTS, every=3))
def test_soft_labels_of_unmixed_states(model, cut):
    """The probability that an example gives to the mixed label, written as a target over the vocabulary."""
    check_objective(SoftLabels(mu=MU))
    head = model.get_output_embeddings().weight

    def mix(c: int, u: int, lam: torch.Tensor) -> torch.Tensor:
        share, both = lam[:, None], [response(model, DATA[row]) for row in (c, u)]
        log_c, log_u = (torch.log_softmax(hidden[: len(lam)] @ head.T, -1) for hidden, *_ in both)
        own, other = (F.one_hot(labels[: len(lam)], len(head)).to(log_c) for _, labels, *_ in both)
        target = share * own + (1 - share) * other
        return -(target * (share * log_c + (1 - share) * log_u)).sum()

    case = Case(SoftLabels(mu=MU))
    found = ours(model, case, UNITS, **cut)
    assert_same(found, naive(model, DATA, UNITS, case.seen, mu=MU, mixup_mean="own", mix=mix))


@pytest.mark.parametrize("divergence", ["js", "kl"])
@pytest.mark.parametrize("cut", some_fast(CUTS, every=3))
def test_the_divergence_of_mixtures(model, divergence, cut):
    def mix(c: int, u: int, lam: torch.Tensor) -> torch.Tensor:
        z_c, z_u = (
            response(model, DATA[row])[0][: len(lam)] @ model.get_output_embeddings().weight.T for row in (c, u)
        )
        share = lam[:, None]
        q = share * torch.softmax(z_c, -1) + (1 - share) * torch.softmax(z_u, -1)
        p = torch.softmax(share * z_c + (1 - share) * z_u, -1)
        middle = (q + p) / 2
        js = (F.kl_div(middle.log(), q, reduction="sum") + F.kl_div(middle.log(), p, reduction="sum")) / 2
        return js if divergence == "js" else F.kl_div(p.log(), q, reduction="sum")

    case = Case(MixtureDivergence(mu=MU, divergence=divergence))
    found = ours(model, case, UNITS, **cut)
    assert_same(found, naive(model, DATA, UNITS, case.seen, mu=MU, mixup_mean="own", mix=mix))


@pytest.mark.parametrize("divergence", ["js", "kl"])
@pytest.mark.parametrize("bias", [[0.0] * 4, [0.0, -torch.inf, 0.0, 0.0]], ids=["all words", "a masked word"])
def test_a_divergence_of_probabilities_that_underflow_is_finite(divergence, bias):
    """Logits 300 apart: in float32 most probabilities are 0; in float64 none is, and a masked word is left out."""
    objective = MixtureDivergence(divergence=divergence)
    batch = collate([UNITS[0]], DATA)
    plan = objective.plan(batch, **AT)
    labels = batch.labels % 4
    batch = replace(batch, labels=torch.where(labels == 1, 0, labels))
    head = SimpleNamespace(weight=300 * torch.eye(4), bias=torch.tensor(bias), softcap=None, scale=1.0)
    hidden = torch.eye(4)[torch.arange(len(labels)) % 4].requires_grad_()
    out = objective.loss(LossView(head, lambda: hidden), batch, plan)
    out.loss.backward()
    assert hidden.grad.isfinite().all()
    words = torch.tensor(bias).isfinite()
    z = (hidden.detach().double() @ head.weight.double().T)[:, words]
    expected = []
    for (one, other), lam in zip(plan.pairs.tolist(), plan.lam.double().tolist(), strict=True):
        q = lam * z[one].softmax(-1) + (1 - lam) * z[other].softmax(-1)
        p = (lam * z[one] + (1 - lam) * z[other]).softmax(-1)
        middle = (q + p) / 2 if divergence == "js" else p
        of_q = (q * (q / middle).log()).sum()
        expected.append(float((of_q + (p * (p / middle).log()).sum()) / 2 if divergence == "js" else of_q))
    assert out.mixup.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("objective", "changed", "words"),
    [
        (ManifoldMixup(layers=[0, 3]), {}, r"objective\.layers is \[0, 3\]; allowed: from 0 to 2"),
        (ProFit(mixup=CutMix()), {"packed": True}, r"set data\.packing false"),
        (SFTMix(alpha=Linear(start=0.5, end=0.0)), {}, r"objective\.alpha at step 8 of 9 is 0\.0"),
        (SFTMix(mu=Linear(start=0.2, end=-0.1)), {}, r"objective\.mu at step 6 of 9 is -"),
        (SFTMix(mu=Linear(start=0.2, end=0), alpha=Linear(start=1, end=0)), {}, ""),  # no lambda is drawn at mu 0
        (EmbeddingMixup(), {}, ""),
    ],
)
def test_what_a_later_step_could_not_use_is_refused_at_once(objective, changed, words):
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        objective.check({"a": 1}, **{"packed": False, "layers": 2, "total_steps": 9, **changed})


def test_the_cut_is_where_the_draw_of_its_pair_says():
    """round((1 - lambda) N) of N tokens, from a place keyed by seed, step and the two ids."""
    batch = collate(UNITS, DATA)
    plan, shares = CutMix().plan(batch, **AT), SFTMix().plan(batch, **AT).lam
    swapped = torch.zeros(len(batch.pairs), dtype=torch.bool)
    starts = []
    for pair, (c, u) in enumerate(batch.slot_pairs.tolist()):
        places = (batch.pair_index == pair).nonzero()[:, 0]
        length = round((1 - float(shares[places[0]])) * len(places))
        starts.append(generator(5, "cut", STEP, batch.ids[c], batch.ids[u]).integers(len(places) - length + 1))
        swapped[places[starts[-1] : starts[-1] + length]] = True
    assert any(starts)
    own, other = batch.labels[batch.pairs].unbind(1)
    expected = torch.cat([torch.where(swapped, other, own), torch.where(swapped, own, other)])
    assert torch.equal(plan.own, expected)
    assert torch.equal(plan.other, expected)
    assert torch.equal(plan.input_ids[plan.line, plan.column + 1], expected)


def test_of_several_layers_each_step_draws_one():
    objective = ManifoldMixup(layers=[0, 1, 2])
    batch = collate(UNITS, DATA)
    layers = [objective.plan(batch, step=step, total_steps=30, seed=5).layer for step in range(30)]
    assert {*layers} == {0, 1, 2}
    assert layers == [objective.plan(batch, step=step, total_steps=30, seed=5).layer for step in range(30)]


@pytest.mark.parametrize("cls", [EmbeddingMixup, ManifoldMixup, CutMix, SoftLabels, MixtureDivergence])
def test_without_mu_it_is_ntp(cls):
    model = toy_model()
    batch = collate(UNITS, DATA)
    plan = cls(mu=0).plan(batch, **AT)
    module = TrainingModule(model)
    assert torch.equal(module(batch, plan, loss=cls(mu=0).loss).loss, module(batch, plan).loss)


def test_a_layer_that_is_not_there_is_named(model):
    with pytest.raises(ConfigError, match=r"no decoder layer 3; allowed: 1 to 2, and 0"):
        ours(model, Case(ManifoldMixup(layers=3)), UNITS)
    recompute_activations(model)
    with pytest.raises(ConfigError, match=r"activation_checkpointing true and states after layer 1"):
        ours(model, Case(ManifoldMixup(layers=1)), UNITS)
    with pytest.raises(ConfigError, match=r"objective\.layers is \[-1\]"):
        ManifoldMixup(layers=[-1])


def test_mixtures_elsewhere_are_not_measured_at_the_head():
    with pytest.raises(ConfigError, match="callbacks MeasureMixing and an objective that mixes embeddings or states"):
        LossView(None, lambda: torch.ones(1)).states(torch.ones(1, 1), torch.ones(1, 1))


def test_packed_documents_are_refused():
    packed = replace(DATA[0], starts=np.array([0, 4]))
    data = RowsInMemory([packed, *DATA[1:]])
    with pytest.raises(ConfigError, match="examples of one document"):
        EmbeddingMixup().plan(collate(UNITS, data), **AT)


SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BY_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0}
BY_LAYER |= {"layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LAUREL = {"intermediate_size": [64, 64], "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}
V4 = {"num_key_value_heads": 1, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
V4 |= {"q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
V4 |= {"hc_mult": 3, "layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["moe"] * 2}
FAMILIES = {
    "LlamaConfig": SMALL,
    "FalconH1Config": {**SMALL, **MAMBA, "embedding_multiplier": 5.0},
    "Gemma3nTextConfig": {**SMALL, **BY_LAYER, **LAUREL, "altup_num_inputs": 2},
    "Gemma4TextConfig": {**SMALL, **BY_LAYER},
    "DeepseekV4Config": {**SMALL, **V4},
}
SUMS = 2 * (5 * 32 + 64)
"""Numbers that one state of these models is the sum of: in two layers, over its inputs for q, k, v, o and the MLP."""
SEVERAL = {"Gemma3nTextConfig": r"\[2, 2, 13, 32\]", "DeepseekV4Config": r"\[2, 13, 3, 32\]"}
"""Families with several states of each token between their layers: [streams, R, L, D], or [R, L, streams, D]."""


@pytest.mark.parametrize("family", [name for name in FAMILIES if hasattr(transformers, name)])
def test_states_are_those_of_the_model(family):
    """Some families scale the embeddings of ids, or look up more of them for each layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, family)(**FAMILIES[family])).eval()
    view, ids = ModelView(TrainingModule(model), lambda: torch.ones(1)), torch.randint(3, 96, (2, 10))
    padded, mask = (F.pad(x, (3, 0)) for x in (ids, torch.ones_like(ids, dtype=torch.bool)))
    with torch.no_grad():
        expected = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        limit = rounding(expected, SUMS)
        torch.testing.assert_close(view.states(padded, mask)[:, 3:], expected, rtol=0, atol=limit)
        same = view.states(padded, mask, change=lambda e: e.clone())[:, 3:]
        torch.testing.assert_close(same, expected, rtol=0, atol=limit)
        if family == "LlamaConfig":
            assert view.layers == 2
            every = model(input_ids=ids, output_hidden_states=True).hidden_states
            for layer in (0, 1):
                found = view.states(padded, mask, layer=layer)[:, 3:]
                torch.testing.assert_close(found, every[layer], rtol=0, atol=limit)
        for layer in (0, 1):
            refusal = (
                rf"{type(model).__name__} keeps several states of each token .*\({SEVERAL.get(family)} after layer 1"
            )
            refused = layer and family in SEVERAL
            with pytest.raises(ConfigError, match=refusal) if refused else nullcontext():
                moved = view.states(padded, mask, layer=layer, change=lambda states: states.flip(-1))[:, 3:]
                assert (moved - expected).abs().max() > 1e-3
