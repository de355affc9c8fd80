"""Online losses of a skipped step: where rows are padded, one example that is not finite costs no other its loss."""

import numpy as np
import pytest
import torch

from sftmix.batches.order import Slot, Unit
from sftmix.common.world import World
from sftmix.components.base import Perturbation
from sftmix.training.dynamics import OnlineLosses
from sftmix.training.loop import train
from tests.toy import VOCABULARY, own_nll, toy_model, toy_rows, toy_stage

SIZES = [(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)]
DATA = toy_rows(SIZES, vocabulary=VOCABULARY - 1)
BAD, TOKEN = 3, VOCABULARY - 1
DATA[BAD].input_ids[1] = TOKEN  # which no other example has
STEPS: list[list[Unit]] = [
    [(Slot(0), Slot(1)), (Slot(2), Slot(BAD)), (Slot(6), Slot(2, 0.0))],
    [(Slot(4),), (Slot(5),)],
]
"""No weight has moved when the second is computed: the first is skipped where BAD is not finite."""


class Break(Perturbation):
    """Makes BAD not finite."""

    def embeddings(self, e, mask, *, ids, step, seed):
        return e * torch.tensor([float("inf") if i == DATA.ids[BAD] else 1.0 for i in ids])[:, None, None]


@pytest.mark.parametrize("broken", ["weight", "perturbation"])
@pytest.mark.parametrize("padding_free", [True, False])
def test_an_example_that_is_not_finite_costs_no_example_of_another_row_its_loss(tmp_path, padding_free, broken):
    """Padding-free, all examples of the first step stand in the row of BAD: none of them is scored."""
    model = toy_model(dtype=torch.float32)
    more = {"perturbation": Break()} if broken == "perturbation" else {}
    if broken == "weight":
        model.get_input_embeddings().weight.data[TOKEN] = float("inf")
    options = {"padding_free": padding_free, "micro_batch_size": 8, "length_groups": 1}
    online = OnlineLosses(DATA.ids, tmp_path / "online", World())
    stage = toy_stage(tmp_path, STEPS, model=model, data=DATA, options=options, online=online, **more)
    assert train(stage, World()).figures["skipped"] == 1
    losses = online.read(0)
    scored = np.isin(np.arange(len(DATA)), [4, 5] if padding_free else [0, 1, 2, 4, 5, 6])
    np.testing.assert_array_equal(losses.n_tokens, np.where(scored, [n for _, n in SIZES], 0))
    expected = np.array([nll.sum() for nll in own_nll(toy_model(dtype=torch.float32), DATA)])
    np.testing.assert_allclose(losses.nll_sum[scored, 0], expected[scored], rtol=1e-6)
