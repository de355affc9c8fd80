"""What a step knows before its first backward, and what is done to embeddings only there."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from sftmix.batches.collate import collate
from sftmix.batches.order import ResponsesAlone, Slot
from sftmix.components import NTP
from sftmix.components.base import Perturbation
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import training_module, wrap
from sftmix.training.scoring import Scorer, with_batch_nll
from sftmix.training.step import micro_batches, normalise
from tests.forked import on_ranks
from tests.model.test_models import FAMILIES, TINY, build
from tests.toy import own_nll, toy_model, toy_rows

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


def test_gradients_go_through_the_perturbation_to_the_embeddings():
    model = toy_model(tied=False)
    loss_of(model, UNITS, Shift(), n_segments=2).backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_responses_alone_are_the_first_token_and_the_response():
    """Each response scored by hand behind nothing but the first token of its sequence."""
    model = toy_model().eval()
    rows = []
    for example in DATA:
        response = example.input_ids[example.target] if example.target[0] == 0 else example.input_ids[1:]
        ids = np.concatenate([example.input_ids[:1], response])
        rows.append(replace(example, input_ids=ids, target=np.arange(len(ids)) > 0))
    found = Scorer(world=World())(TrainingModule(model), ResponsesAlone(DATA, np.arange(len(DATA))))
    assert found.n_tokens.tolist() == [len(row.input_ids) - 1 for row in rows]
    np.testing.assert_allclose(found.nll_sum, [nll.sum() for nll in own_nll(model, rows)], rtol=1e-10)


def test_a_model_that_only_scores_is_frozen_and_has_no_buckets():
    """One of two ranks, which never met: what ddp would need is not asked for."""
    model = toy_model(dtype=torch.float32)
    module = training_module(model, TrainingOptions(parallel="ddp"), precision="fp32", world=World(size=2))
    assert type(module) is TrainingModule
    assert not any(p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------------------------- perturbations that change nothing

ROWS = toy_rows([(3, 5), (7, 2), (1, 6)])
BY_LAYER = {"layer_types": ["full_attention"] * 2, "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8}
BY_LAYER |= {"num_kv_shared_layers": 0}
GEMMA3N = {"altup_num_inputs": 2, "laurel_rank": 4, "intermediate_size": [48] * 2}
GEMMA3N |= {"activation_sparsity_pattern": [0.0] * 2}
MORE = {
    "gemma3n": ("Gemma3nText", TINY | BY_LAYER | GEMMA3N),
    "gemma4": ("Gemma4Text", TINY | BY_LAYER | {"global_head_dim": 8, "num_global_key_value_heads": 2}),
}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_perturbation_that_changes_nothing_changes_no_loss(family, monkeypatch):
    for name, made in MORE.items():
        monkeypatch.setitem(FAMILIES, name, made)
    model = build(family)

    def times(factor: int):
        return lambda e, mask, *, ids: factor * e

    batch, module = collate([(Slot(row),) for row in range(3)], ROWS), TrainingModule(model)
    plan = NTP().plan(batch, step=0, total_steps=1, seed=0)
    plain, unchanged = module(batch, plan), module(batch, plan, perturb=times(1))
    assert torch.equal(plain.nll, unchanged.nll)
    assert not torch.equal(plain.nll, module(batch, plan, perturb=times(2)).nll)
    assert torch.equal(plain.nll, module(batch, plan).nll)  # nothing stays behind
