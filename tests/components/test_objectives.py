"""Objectives: weights, lambdas and counts of a plan."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import NTP, AfterFraction, DecomposedMixup, Linear, MixupOnly, Need, SFTMix
from sftmix.components.base import Schedule
from sftmix.components.contracts import check_plan
from sftmix.ranks.rng import generator
from sftmix.testing import rows_in_memory
from sftmix.types import Split
from sftmix.words.errors import ConfigError

AT = {"step": 3, "total_steps": 10, "seed": 7}


def make_batch(lengths, pairs=0, *, weights=None, groups=None):
    """Examples with so many response tokens, those of the first pairs beside each other."""
    slots = [Slot(row, weight) for row, weight in enumerate(weights or [1.0] * len(lengths))]
    units = [
        *zip(slots[: 2 * pairs : 2], slots[1 : 2 * pairs : 2], strict=True),
        *((one,) for one in slots[2 * pairs :]),
    ]
    split = Split(np.array(groups, dtype=np.int8), ("high", "middle", "low")) if groups else None
    return collate(units, rows_in_memory([(1, length) for length in lengths]), split=split)


def test_the_mean_of_a_response_weighs_its_tokens_by_the_weights_of_the_rows():
    weight, plain = torch.tensor([2.0, 0.5, 1.0, 4.0, 3.0]), make_batch([2, 3], 1)
    batch, objective = dataclasses.replace(plain, weight=weight), SFTMix(mu=0.5, mean="sequence")
    plan, lam = objective.plan(batch, **AT), objective.plan(plain, **AT).lam.double()
    assert plan.row_weight.tolist() == pytest.approx([1, 0.25, 1 / 3, 4 / 3, 1])
    assert plan.ntp_count == pytest.approx(1.25 + 8 / 3)
    expected = (lam * weight[:2] + (1 - lam) * weight[2:4]) / 2
    torch.testing.assert_close(plan.pair_weight, 0.5 * expected, rtol=1e-12, atol=0)
    assert plan.mixup_count == pytest.approx(float(expected.sum()), rel=1e-12)


@st.composite
def batches(draw):
    n = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, 6), min_size=n, max_size=n))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    groups = draw(st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=n, max_size=n))
    return make_batch(lengths, draw(st.integers(0, n // 2)), weights=weights, groups=groups)


def assert_same_plan(a, b):
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@given(
    batches(),
    st.sampled_from([SFTMix, DecomposedMixup]),
    st.sampled_from(["pair", "batch", "token"]),
    st.sampled_from(["own", "ntp"]),
)
def test_without_mu_the_plan_is_that_of_ntp(batch, cls, lambda_per, mixup_mean):
    objective = cls(mu=0.0, lambda_per=lambda_per, mixup_mean=mixup_mean)
    assert_same_plan(objective.plan(batch, **AT), NTP().plan(batch, **AT))


@given(batches(), st.sampled_from(["all", "confident", "unconfident"]), st.floats(0.01, 5))
def test_weights_and_counts(batch, ntp_on, mu):
    plan = SFTMix(mu=mu, ntp_on=ntp_on, mixup_mean="ntp").plan(batch, **AT)
    wanted = {"all": {-1, 0, 1, 2}, "confident": {0}, "unconfident": {2}}[ntp_on]
    expected = [batch.ntp_weight[s].item() * (batch.group[s].item() in wanted) for s in batch.slot.tolist()]
    assert plan.row_weight.tolist() == expected
    assert plan.ntp_count == sum(expected)
    assert torch.equal(plan.pairs, batch.pairs)
    assert plan.mixup_count == len(batch.pairs)
    assert plan.pair_weight.tolist() == [np.float32(mu)] * len(batch.pairs)
    assert plan.lam.shape == (len(batch.pairs),)
    assert plan.lam.dtype == torch.float32
    assert ((plan.lam >= 0) & (plan.lam <= 1)).all()
    assert (plan.mu, plan.mixup_mean) == (mu, "ntp")


@given(batches(), st.sampled_from(["confident", "unconfident"]))
def test_weights_and_counts_of_sequences_of_one_half(batch, ntp_on):
    plan, group = SFTMix(ntp_on=ntp_on, mean="sequence").plan(batch, **AT), 0 if ntp_on == "confident" else 2
    weight = [w * (g == group) for w, g in zip(batch.ntp_weight.tolist(), batch.group.tolist(), strict=True)]
    size = batch.n_tokens.tolist()
    assert plan.row_weight.tolist() == [weight[slot] / size[slot] for slot in batch.slot.tolist()]
    assert plan.ntp_count == sum(weight)


PAIRS = [("example-0", "example-1"), ("example-2", "example-3")]


def test_lambda_is_keyed_by_seed_step_and_the_two_ids():
    """The draw that method.md and the type legend promise, written out; another process or rank gets the same."""
    batch = make_batch([2, 3, 4, 1], 2)
    lam = SFTMix(alpha=0.5).plan(batch, **AT).lam
    draws = [generator(7, "lambda", 3, *ids).beta(0.5, 0.5) for ids in PAIRS]
    assert lam.tolist() == [np.float32(draws[0])] * 2 + [np.float32(draws[1])]
    lam = SFTMix(alpha=0.5, lambda_per="token").plan(batch, **AT).lam
    draws = [generator(7, "lambda", 3, *ids).beta(0.5, 0.5, size) for ids, size in zip(PAIRS, (2, 1), strict=True)]
    assert lam.tolist() == np.concatenate(draws).astype(np.float32).tolist()
    lam = SFTMix(alpha=0.5, lambda_per="batch").plan(batch, **AT).lam
    assert lam.tolist() == [np.float32(generator(7, "lambda", 3).beta(0.5, 0.5))] * 3


def test_ntp_on_one_half_needs_a_split():
    batch = make_batch([2, 2])
    with pytest.raises(ConfigError, match=r"objective\.ntp_on"):
        SFTMix(ntp_on="confident").plan(batch, **AT)
    assert SFTMix().plan(batch, **AT).ntp_count == 4


def test_only_sftmix_asks_for_pairs():
    assert SFTMix.needs == {Need.PAIRS}
    assert not NTP.needs
    assert MixupOnly.needs == {Need.PAIRS, Need.FIRST_SPLIT}
    assert set(MixupOnly().spec()["init_args"]) == {"alpha", "lambda_per", "mean"}


# --------------------------------------------------------------------------------------------- schedules


@given(batches(), st.integers(0, 10), st.sampled_from([SFTMix, DecomposedMixup]))
def test_a_schedule_gives_the_plan_of_its_value(batch, step, cls):
    at = {"step": step, "total_steps": 11, "seed": 7}
    late = SFTMix(mu=AfterFraction(fraction=0.5, value=0.3)).plan(batch, **at)
    assert_same_plan(late, (NTP() if step < 5.5 else SFTMix(mu=0.3)).plan(batch, **at))  # NTP's, bit for bit
    scheduled = cls(mu=Linear(start=0, end=0.5), alpha=Linear(start=2.0, end=1.0))
    assert_same_plan(scheduled.plan(batch, **at), cls(mu=0.5 * step / 10, alpha=2.0 - step / 10).plan(batch, **at))


class Broken(Schedule):
    """Goes where it must not."""

    def __init__(self, *, last: float):
        self.last = last

    def value(self, step, total_steps):
        return self.last if step == 3 else 0.5


@pytest.mark.parametrize(
    ("key", "last"), [("mu", -0.25), ("mu", float("nan")), ("alpha", 0.0), ("alpha", float("inf"))]
)
def test_a_schedule_that_leaves_the_range_is_named_with_its_step(key, last):
    objective, batch = SFTMix(**{key: Broken(last=last)}), make_batch([2, 3], 1)
    objective.plan(batch, step=2, total_steps=10, seed=7)
    with pytest.raises(ConfigError, match=rf"objective\.{key} at step 3 of 10 is {last}; allowed: "):
        objective.plan(batch, **AT)


# --------------------------------------------------------------------------------- averages and controls


def test_pairs_of_tokens_that_are_not_in_the_micro_batch_are_refused():
    """A row of -1 would be the last token."""
    batch = make_batch([3, 2], 1)
    plan = SFTMix().plan(batch, **AT)
    plan.pairs[0, 0] = -1
    with pytest.raises(ConfigError, match="pairs -1 to 4; allowed: 0 to 4"):
        check_plan(SFTMix(), plan, batch)
