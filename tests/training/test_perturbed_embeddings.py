"""Perturbed embeddings: of every family, those with embeddings in each layer too, and once for each micro-batch."""

import pytest
import torch

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.world import World
from sftmix.components import NTP, Perturbation
from sftmix.training.loop import train
from sftmix.training.module import TrainingModule
from tests.model.test_models import FAMILIES, TINY, build
from tests.toy import logged, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (7, 2), (1, 6)])
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
    model, seen = build(family), []

    def same(e, mask, *, ids):
        seen.append((tuple(e.shape[:2]), ids))
        return e

    def twice(e, mask, *, ids):
        return 2 * e

    batch, module = collate([(Slot(row),) for row in range(3)], DATA), TrainingModule(model)
    plan = NTP().plan(batch, step=0, total_steps=1, seed=0)
    plain, unchanged = module(batch, plan), module(batch, plan, perturb=same)
    assert torch.equal(plain.nll, unchanged.nll)
    order = [[batch.ids[slot] for slot in segment.slots] for segment in batch.segments]
    assert seen == [(tuple(one.input_ids.shape), ids) for one, ids in zip(batch.segments, order, strict=True)]
    assert not torch.equal(plain.nll, module(batch, plan, perturb=twice).nll)
    assert torch.equal(plain.nll, module(batch, plan).nll)  # nothing stays behind


class Counted(Perturbation):
    """Larger embeddings, and how often they were asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embeddings(self, e, mask, *, ids, step, seed):
        self.calls.append(list(ids))
        return 1.5 * e


def test_recomputed_layers_ask_for_nothing_again(tmp_path):
    found = []
    for again in (False, True):
        place, perturbation = tmp_path / f"{again}", Counted()
        options = {"activation_checkpointing": again, "micro_batch_size": 2}
        batches = [[(Slot(0),), (Slot(1),), (Slot(2),)]]
        train(toy_stage(place, batches, options=options, data=DATA, perturbation=perturbation), World())
        found.append((perturbation.calls, [logged(place)[0][name] for name in ("loss", "grad_norm")]))
    assert found[0] == found[1]
    assert sorted(name for ids in found[0][0] for name in ids) == sorted(DATA.ids)
