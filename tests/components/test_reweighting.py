"""Label smoothing, DFT and IR-DRO: their plans against formulas written another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftmix.common.errors import ConfigError
from sftmix.components import DFT, IRDRO, LabelSmoothing, Need
from sftmix.types import Batch, BatchNLL

AT = {"step": 3, "total_steps": 10, "seed": 7}


def make_batch(rows, lengths, weights, batch_nll=None):
    """A batch without inputs and pairs."""
    return Batch(
        ids=tuple(f"e{row}" for row in rows),
        rows=torch.tensor(rows),
        ntp_weight=torch.tensor(weights, dtype=torch.float32),
        group=torch.full((len(rows),), -1),
        n_groups=0,
        labels=torch.zeros(sum(lengths), dtype=torch.int64),
        slot=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)),
        slot_pairs=torch.empty((0, 2), dtype=torch.int64),
        pairs=torch.empty((0, 2), dtype=torch.int64),
        pair_index=torch.empty(0, dtype=torch.int64),
        segments=(),
        batch_nll=batch_nll,
    )


def test_an_epsilon_that_is_no_share_is_refused():
    for epsilon in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=rf"objective\.epsilon is {epsilon}; allowed: from 0 to below 1"):
            LabelSmoothing(epsilon=epsilon)


@given(st.data())
def test_irdro_cut_into_micro_batches_is_a_softmax_over_the_global_batch(data):
    n = data.draw(st.integers(1, 9))
    rows = data.draw(st.permutations(range(0, 3 * n, 3)))
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=n, max_size=n))
    mean_nll = np.asarray(data.draw(st.lists(st.floats(0, 12), min_size=n, max_size=n)))
    tau = data.draw(st.sampled_from([0.1, 1.0, 3.0]))
    order = np.argsort(rows)
    found = BatchNLL(
        rows=torch.tensor(np.asarray(rows)[order]),
        nll_sum=torch.tensor((mean_nll * lengths)[order]),
        n_tokens=torch.tensor(np.asarray(lengths)[order]),
    )
    # Written out: exp(l_i / tau) / sum_j exp(l_j / tau) = 1 / sum_j exp((l_j - l_i) / tau).
    expected = [1 / sum(np.exp((other - own) / tau) for other in mean_nll) for own in mean_nll]
    cut = data.draw(st.integers(0, n))
    total = 0.0
    for part in (slice(0, cut), slice(cut, n)):
        if not rows[part]:
            continue
        # A repeat with NTP weight 0, and a filler whose row is not of this global batch, join the micro-batch.
        extra = [rows[part][0], 3 * n + 1]
        batch = make_batch([*rows[part], *extra], [*lengths[part], 2, 3], [1.0] * len(rows[part]) + [0.0, 0.0], found)
        plan = IRDRO(tau=tau).plan(batch, **AT)
        weights = [[w] * length for w, length in zip(expected[part], lengths[part], strict=True)]
        per_token = [w / len(ws) for ws in weights for w in ws] + [0.0] * 5
        np.testing.assert_allclose(plan.row_weight, per_token, rtol=1e-12)
        total += plan.ntp_count
    assert total == pytest.approx(1, rel=1e-12)


def test_irdro_needs_the_losses_of_its_batch():
    assert IRDRO.needs == {Need.BATCH_NLL}
    batch = make_batch([4, 2], [2, 3], [1.0, 1.0])
    with pytest.raises(ConfigError, match=r"batch\.batch_nll is None"):
        IRDRO().plan(batch, **AT)
    other = BatchNLL(torch.tensor([2, 3]), torch.tensor([1.0, 1.0]), torch.tensor([1, 1]))
    with pytest.raises(ConfigError, match="does not hold all examples"):
        IRDRO().plan(replace(batch, batch_nll=other), **AT)
    for tau in (0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match=rf"objective\.tau is {tau}; allowed: a number above 0"):
            IRDRO(tau=tau)


def test_none_of_them_mixes():
    for objective in (LabelSmoothing(), DFT(), IRDRO()):
        assert Need.PAIRS not in objective.needs
