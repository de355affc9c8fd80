"""How a global batch is dealt: whole units, within the limits, few padded slots, like loads (property tests)."""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftmix.batches.collate import collate, token_slots
from sftmix.batches.deal import MicroStep, deal
from sftmix.batches.order import Slot, Unit, epoch_units, global_batches
from sftmix.options import TrainingOptions
from tests.batches.test_collate import an_epoch
from tests.toy import toy_rows

BY_TOKENS = st.fixed_dictionaries({"micro_batch_tokens": st.integers(1, 400)})
BY_SIZE = st.fixed_dictionaries({"micro_batch_size": st.sampled_from([2, 4, 8])})
LAYOUTS = st.one_of(
    st.fixed_dictionaries({"length_groups": st.integers(1, 6)}), st.just({"padding_free": True, "length_groups": 4})
)


def lengths_of(n):
    """Token counts that spread like those of instructions, at least 3."""
    return np.random.default_rng(n).lognormal(3.2, 0.8, n).astype(int) + 3


def dealt(units, lengths, *, ranks=1, padding_free=False, **options):
    options = TrainingOptions(**{"length_groups": 1, **options})
    return deal(units, lengths, options, ranks=ranks, device=torch.device("cpu"), padding_free=padding_free)


def slots_of(step, rank, data, padding_free):
    """Token slots of the tensors that the backbone is really given."""
    batch = collate(step.ranks[rank], data, n_segments=step.n_segments, padding_free=padding_free)
    return sum(segment.input_ids.numel() for segment in batch.segments)


@dataclass(frozen=True)
class DealtEpoch:
    """The global batches of an epoch, and the micro-steps into which each was dealt."""

    lengths: list[int]
    ranks: int
    limit: dict[str, int]
    layout: dict[str, Any]
    batches: list[list[Unit]]
    dealt: list[list[MicroStep]]

    @property
    def steps(self) -> list[MicroStep]:
        return [step for steps in self.dealt for step in steps]


@st.composite
def dealt_epochs(draw, limits=BY_TOKENS | BY_SIZE) -> DealtEpoch:
    n, pairs = draw(an_epoch())
    ranks = draw(st.integers(1, 4))
    limit = draw(limits)
    layout = draw(LAYOUTS)
    lengths = lengths_of(n)
    batches = global_batches(epoch_units(n, pairs, epoch=0, seed=0), 32)
    steps = [dealt(units, lengths, ranks=ranks, **limit, **layout) for units in batches]
    return DealtEpoch(lengths.tolist(), ranks, limit, layout, batches, steps)


def n_slots(share: list[Unit]) -> int:
    return sum(len(unit) for unit in share)


@given(dealt_epochs())
def test_each_unit_has_one_place(epoch):
    """Fillers, without NTP and alone, are no units of the batch."""
    for units, steps in zip(epoch.batches, epoch.dealt, strict=True):
        found = [unit for step in steps for share in step.ranks for unit in share]
        assert Counter(unit for unit in found if len(unit) == 2 or unit[0].ntp_weight) == Counter(units)


@given(dealt_epochs())
def test_every_micro_step_has_a_share_for_every_rank(epoch):
    assert all(len(step.ranks) == epoch.ranks for step in epoch.steps)


@given(dealt_epochs())
def test_no_share_is_empty(epoch):
    assert all(share for step in epoch.steps for share in step.ranks)


@given(dealt_epochs())
def test_segments_are_no_more_than_the_length_groups(epoch):
    assert all(1 <= step.n_segments <= epoch.layout["length_groups"] for step in epoch.steps)


@given(dealt_epochs())
def test_segments_are_no_more_than_the_largest_share_has_slots(epoch):
    assert all(step.n_segments <= max(n_slots(share) for share in step.ranks) for step in epoch.steps)


@given(dealt_epochs(BY_SIZE))
def test_no_share_has_more_slots_than_the_micro_batch_size(epoch):
    assert all(n_slots(share) <= epoch.limit["micro_batch_size"] for step in epoch.steps for share in step.ranks)


@given(dealt_epochs(BY_TOKENS))
def test_no_share_of_several_units_has_more_token_slots_than_micro_batch_tokens(epoch):
    data = toy_rows([(length - 1, 1) for length in epoch.lengths])
    padding_free = epoch.layout.get("padding_free", False)
    for step in epoch.steps:
        for rank, share in enumerate(step.ranks):
            if len(share) > 1:
                assert slots_of(step, rank, data, padding_free) <= epoch.limit["micro_batch_tokens"]


def test_as_many_examples_as_fit():
    """Twelve of ten tokens in rows of forty: three micro-batches of four, padded or not."""
    units = [(Slot(row),) for row in range(12)]
    for layout in ({}, {"padding_free": True}, {"length_groups": 3}):
        steps = dealt(units, np.full(12, 10), micro_batch_tokens=40, **layout)
        assert [len(s.ranks[0]) for s in steps] == [4, 4, 4]


UNLIKE = np.random.default_rng(0).lognormal(4.5, 0.7, 128).astype(int) + 8
"""Token counts that differ by much."""


@pytest.mark.parametrize(("world", "limit"), [(1, {"micro_batch_size": 8}), (4, {"micro_batch_tokens": 1024})])
def test_similar_lengths_meet_where_one_segment_holds_them(world, limit):
    units = epoch_units(len(UNLIKE), None, epoch=0, seed=0)
    steps = dealt(units, UNLIKE, ranks=world, **limit)
    shares = [share for step in steps for share in step.ranks]
    slots = sum(token_slots([UNLIKE[slot.row] for unit in share for slot in unit], 1) for share in shares)
    assert UNLIKE.sum() / slots > 0.85  # of micro-batches of eight at random 0.52


@pytest.mark.parametrize("limit", [{"micro_batch_size": 8}, {"micro_batch_tokens": 1024}])
@pytest.mark.parametrize("layout", [{}, {"length_groups": 4}, {"padding_free": True}])
def test_ranks_of_a_micro_step_carry_like_loads(limit, layout):
    """What the ranks wait for each other is less than with one sorted micro-batch after the other dealt out."""
    lengths = np.random.default_rng(1).lognormal(4.5, 0.6, 256).astype(int) + 8
    units = epoch_units(256, np.arange(256).reshape(-1, 2), epoch=0, seed=0)
    waited = 0
    total = 0
    for step in dealt(units, lengths, ranks=2, **limit, **layout):
        costs = [
            token_slots(
                [lengths[s.row] for u in rank for s in u], step.n_segments, padding_free="padding_free" in layout
            )
            for rank in step.ranks
        ]
        waited += max(costs) - min(costs)
        total += sum(costs)
    assert waited / total < 0.1


PADDING_FREE = {"micro_batch_tokens": 10**6, "padding_free": True}


def loads(step, lengths) -> list[int]:
    """The real tokens of each rank."""
    return [sum(int(lengths[slot.row]) for unit in share for slot in unit) for share in step.ranks]


def test_ranks_wait_less_than_if_each_unit_went_to_the_emptiest_rank():
    """16 pairs a step on four ranks; the real tokens over those of the slowest rank, times the ranks."""
    ranks, lengths = 4, np.random.default_rng(2).lognormal(4.5, 0.7, 640).astype(int) + 8
    real = emptiest = slowest = 0
    for units in global_batches(epoch_units(640, np.arange(640).reshape(-1, 2), epoch=0, seed=0), 32):
        by_hand = [0] * ranks
        for pair in sorted((sum(lengths[slot.row] for slot in unit) for unit in units), reverse=True):
            by_hand[int(np.argmin(by_hand))] += pair
        (step,) = dealt(units, lengths, ranks=ranks, **PADDING_FREE)
        assert max(loads(step, lengths)) <= max(by_hand)
        real, emptiest, slowest = real + sum(by_hand), emptiest + max(by_hand), slowest + max(loads(step, lengths))
    assert real / (ranks * emptiest) < 0.975
    assert real / (ranks * slowest) > 0.98


ALPACA = np.random.default_rng(3).lognormal(4.4, 0.5, 32).astype(int)
"""Token counts of 32 rows: 98 on average, 429 the longest."""


def passes(lengths, *, device="cuda", padding_free=True, **options) -> list[int]:
    """Examples of each micro-batch of one rank; the device is one in name."""
    options, units = TrainingOptions(**options), [(Slot(row), Slot(row + 1)) for row in range(0, 32, 2)]
    steps = deal(units, lengths, options, ranks=1, device=torch.device(device), padding_free=padding_free)
    return [n_slots(step.ranks[0]) for step in steps]


@pytest.mark.parametrize("padding_free", [True, False])
def test_short_rows_are_one_pass_on_a_gpu_and_long_ones_several(padding_free):
    fits = {"micro_batch_tokens": 16_384, "padding_free": padding_free}
    assert passes(ALPACA, **fits) == [32]
    assert passes(np.full(32, 2048), **fits) == [8] * 4
    assert passes(np.full(32, 16_384), **fits) == [2] * 16  # a pair above the limit goes alone


def test_the_default_is_eight_rows_on_a_cpu_and_no_number_of_rows_on_a_gpu():
    assert passes(ALPACA, device="cpu") == [8] * 4
    assert passes(ALPACA) == passes(ALPACA, micro_batch_tokens="auto") == [32]
    assert passes(ALPACA, micro_batch_size=4) == [4] * 8


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 12), st.booleans())
def test_token_slots_are_those_of_the_tensors(lengths, n_segments, padding_free):
    data = toy_rows([(max(n - 1, 1), int(n > 1)) for n in lengths])
    batch = collate(
        [(Slot(row),) for row in range(len(lengths))], data, n_segments=n_segments, padding_free=padding_free
    )
    idle = 0 if padding_free else max(0, n_segments - len(lengths))
    expected = token_slots(lengths, n_segments, padding_free=padding_free) + idle
    assert sum(s.input_ids.numel() for s in batch.segments) == expected


def test_a_row_without_padding_holds_the_slots_one_after_the_other():
    data = toy_rows([(2, 2), (3, 3), (2, 1)])
    batch = collate([(Slot(1), Slot(0)), (Slot(2),)], data, padding_free=True)
    (segment,) = batch.segments
    assert segment.input_ids.tolist() == [[*data[1].input_ids, *data[0].input_ids, *data[2].input_ids]]
    assert segment.position_ids.tolist() == [[*range(6), *range(4), *range(3)]]
    assert segment.lengths == (6, 4, 3)
    assert segment.slots == (0, 1, 2)
    assert segment.attention_mask.all()
    assert segment.index.tolist() == [2, 3, 4, 7, 8, 11]
    assert batch.labels.tolist() == segment.input_ids[0][segment.index + 1].tolist()
    assert segment.order.tolist() == list(range(6))


def test_idle_segments_are_one_token_and_no_slot():
    batch = collate([(Slot(0),)], toy_rows([(3, 2)]), n_segments=3, pad_id=9)
    assert [len(s.slots) for s in batch.segments] == [1, 0, 0]
    assert [s.input_ids.tolist() for s in batch.segments[1:]] == [[[9]], [[9]]]
    assert [len(s.index) for s in batch.segments] == [2, 0, 0]


def test_the_work_of_dealing_grows_with_the_units():
    """Calls of a deal of four times as many units to four times as many ranks; as many deals are tried for both."""

    def calls(ranks: int) -> int:
        lengths, found = np.clip(np.random.default_rng(1).lognormal(4.4, 0.8, 8 * ranks), 8, 2048).astype(int), 0

        def count(frame, event, argument):
            nonlocal found
            found += 1

        units = [(Slot(row), Slot(row + 1)) for row in range(0, len(lengths), 2)]
        sys.setprofile(count)
        try:
            dealt(units, lengths, ranks=ranks, padding_free=True, micro_batch_tokens=20_000)
        finally:
            sys.setprofile(None)
        return found

    assert 3.5 < calls(256) / calls(64) < 4.5
