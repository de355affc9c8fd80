"""What a step knows before its first backward, and what is done to embeddings only there."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.batches.rows import ResponsesAlone
from sftmix.common.world import World
from sftmix.components import NTP, SFTMix
from sftmix.components.base import Perturbation
from sftmix.options import TrainingOptions
from sftmix.training.module import TrainingModule, gradient_sync, unwrap
from sftmix.training.parallel import training_module, wrap
from sftmix.training.scoring import Scorer, with_batch_nll
from sftmix.training.step import micro_batches, normalise
from tests.batches.test_deal import dealt
from tests.forked import on_ranks
from tests.toy import own_nll, toy_model, toy_rows
from tests.training.test_step import Exact, naive

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])
UNITS = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(2, 0.0)), (Slot(5),)]


def check_batch_nll(world: World, parallel: str) -> None:
    model = toy_model(dropout=0.2)  # dropout must be off in this pass
    module = wrap(TrainingModule(model), parallel=parallel, precision="fp32", world=world)
    module.train()
    options = TrainingOptions(micro_batch_size=2, length_groups=1)
    batches = micro_batches(UNITS, DATA, options, world, module, split=None, pad_id=0)
    found = with_batch_nll(batches, DATA.ids, module, world, "fp32")
    assert module.training
    plain = toy_model(dropout=0.2).eval()
    for batch in found:
        nll = batch.batch_nll
        assert nll.rows.tolist() == [0, 1, 2, 3, 4, 5]
        assert nll.n_tokens.tolist() == [5, 2, 11, 4, 1, 6]
        expected = [own.sum() for own in own_nll(plain, DATA)[:6]]
        np.testing.assert_allclose(nll.nll_sum.numpy(), expected, rtol=1e-10)


def test_the_nll_of_the_whole_global_batch_is_handed_out():
    check_batch_nll(World(), "none")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_on_two_ranks_each_knows_all(parallel):
    on_ranks(check_batch_nll, parallel)


FEATURE = torch.linspace(-1, 1, 16, dtype=torch.float64)


class Shift(Perturbation):
    """Adds something of each example's own to its real tokens; not a constant, which the first norm takes away."""

    def embeddings(self, e, mask, *, ids, step, seed):
        assert len(ids) == len(e)
        own = torch.tensor([float(i.rpartition("-")[2]) + step for i in ids], dtype=e.dtype)
        return e + own[:, None, None] * mask[:, :, None] * FEATURE


def loss_of(model, units, perturbation: Perturbation, **layout) -> torch.Tensor:
    batch = collate(units, DATA, **layout)
    plan = NTP().plan(batch, step=3, total_steps=9, seed=0)
    plan = replace(plan, row_weight=plan.row_weight.double())
    perturb = partial(perturbation.embeddings, step=3, seed=0)
    scaled = normalise(plan, ntp_count=plan.ntp_count, mixup_count=0, world_size=1)
    return TrainingModule(model)(batch, scaled, perturb=perturb).loss


def test_a_perturbation_gets_each_example_with_its_own_id():
    """By hand on one example at a time; grouped by length, the slots come in another order, or all stand in one row."""
    model = toy_model().requires_grad_(False)
    total = 0.0
    for row in range(6):
        ids = torch.from_numpy(DATA[row].input_ids)[None]
        embedded = model.get_input_embeddings()(ids) + (row + 3) * FEATURE
        logp = torch.log_softmax(model(inputs_embeds=embedded).logits[0], -1)
        total -= sum(float(logp[t - 1, ids[0, t]]) for t in np.flatnonzero(DATA[row].target))
    units = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4),), (Slot(5),)]
    for layout in ({"n_segments": 1}, {"n_segments": 3}, {"padding_free": True}):
        assert float(loss_of(model, units, Shift(), **layout)) == pytest.approx(total / 29, rel=1e-10)


def check_gradients(world: World, parallel: str, options: TrainingOptions) -> None:
    """Micro-batches of several segments or one row on each rank, against the formula one example after the other."""
    own = replace(options, parallel=parallel)
    module = training_module(toy_model(), own, precision="fp32", world=world, trains=True)
    assert unwrap(module).padding_free is (options.padding_free is True)
    batches = micro_batches(UNITS, DATA, options, world, module, split=None, pad_id=0)
    counts = [len(batch.segments) for batch in batches]
    assert len(set(world.gather(len(batches)))) == 1
    if parallel == "fsdp":
        assert len({str(each) for each in world.gather(counts)}) == 1
    lambdas: dict = {}
    objective = Exact(objective=SFTMix(mu=0.75), seen=lambdas)
    plans = [objective.plan(b, step=3, total_steps=9, seed=5) for b in batches]
    ntp, mixup = world.sum([sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans)])
    for k, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=world.size)
        with gradient_sync(module, k == len(batches) - 1):
            module(batch, scaled).loss.backward()
    for others in world.gather(lambdas):
        lambdas |= others
    _, expected = naive(toy_model(), DATA, UNITS, lambdas, mu=0.75, mixup_mean="own")
    for name, parameter in unwrap(module).model.named_parameters():
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-10)


LAYOUTS = [
    TrainingOptions(micro_batch_tokens=26, length_groups=4),  # a rank with fewer slots than groups has idle segments
    TrainingOptions(micro_batch_tokens=26, padding_free=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", LAYOUTS, ids=["idle segments", "padding-free"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_with_unlike_shares_have_the_gradients_of_the_formula(parallel, options):
    on_ranks(check_gradients, parallel, options)


def test_a_rank_with_fewer_slots_than_segments_is_among_them():
    """So that the test above means something."""
    steps = dealt(UNITS, DATA.lengths, ranks=2, micro_batch_tokens=26, length_groups=4)
    assert any(min(sum(map(len, rank)) for rank in step.ranks) < step.n_segments for step in steps)


def test_gradients_go_through_the_perturbation_to_the_embeddings():
    model = toy_model(tied=False)
    loss_of(model, UNITS, Shift(), n_segments=2).backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_responses_alone_are_the_first_token_and_the_response():
    """Each response scored by hand behind nothing but the first token of its sequence."""
    model = toy_model().requires_grad_(False).eval()
    found = Scorer(world=World())(TrainingModule(model), ResponsesAlone(DATA))
    for row in range(len(DATA)):
        example = DATA[row]
        response = example.input_ids[example.target] if example.target[0] == 0 else example.input_ids[1:]
        ids = torch.from_numpy(np.concatenate([example.input_ids[:1], response]))
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        expected = -sum(float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1))
        assert found.nll_sum[row] == pytest.approx(expected, rel=1e-10)
        assert found.n_tokens[row] == len(response)


def test_a_model_that_only_scores_is_frozen_and_has_no_buckets():
    """One of two ranks, which never met: what ddp would need is not asked for."""
    model = toy_model(dtype=torch.float32)
    module = training_module(model, TrainingOptions(parallel="ddp"), precision="fp32", world=World(size=2))
    assert type(module) is TrainingModule
    assert not any(p.requires_grad for p in module.parameters())
