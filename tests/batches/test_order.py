"""Steps, epochs and the learning rate as functions of the step."""

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.batches.order import Slot, TrainingOrder, digest, epoch_units, global_batches
from sftmix.options import TrainingOptions
from sftmix.training.update import learning_rate


def order(n=10, **options):
    options.setdefault("global_batch_size", 4)
    return TrainingOrder(n, lambda epoch: None, options=TrainingOptions(**options), seed=1)


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"epochs": 2}, [3, 6]),
        ({"epochs": 1.5}, [3, 5]),
        ({"epochs": 0.1}, [1]),
        ({"epochs": 1, "max_steps": 7}, [3, 6, 7]),
        ({"epochs": 9, "max_steps": 2}, [2]),
        ({"epochs": 9, "max_steps": 3}, [3]),
    ],
)
def test_steps_of_epochs(options, ends):
    assert order(**options).ends == ends


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.1, 11), (1.6, 16), (2.3, 23), (0.1 + 0.2, 3), (1 / 3, 4), (2.0001, 21), (1e-6, 1)]
)
def test_an_epoch_cut_short_has_the_steps_of_the_number_as_it_is_written(epochs, steps):
    """Ten batches: 1.1 - 1 is a little above 0.1 in floating point, which is no step more."""
    assert order(40, epochs=epochs).total_steps == steps


@given(st.integers(1, 40), st.integers(0, 30), st.integers(2, 9), st.integers(0, 2), st.integers(0, 2**16))
def test_epochs_are_as_long_as_the_batches_in_them(n, couples, size, repeats, seed):
    """Counted without laying an epoch out, where that can be told; a row may be in several pairs."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(n), rng.integers(0, n, 2 * repeats)])
    pairs = rows[len(rows) % 2 :].reshape(-1, 2)[:couples]
    options = TrainingOptions(global_batch_size=size, epochs=2)
    plan = TrainingOrder(n, lambda epoch: pairs, options=options, seed=1)
    lengths = [len(global_batches(epoch_units(n, pairs, epoch=e, seed=1), size)) for e in range(2)]
    assert plan.ends == [lengths[0], sum(lengths)]


def test_every_epoch_sees_every_row_and_is_shuffled_anew():
    plan = order(epochs=2)
    rows = [[u[0].row for u in plan.batch(s)] for s in range(plan.total_steps)]
    assert [len(r) for r in rows] == [4, 4, 2, 4, 4, 2]
    first, second = [r for b in rows[:3] for r in b], [r for b in rows[3:] for r in b]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert plan.ends == [3, 6]


def test_epochs_of_unlike_length_follow_each_other():
    """As of a sampler that repeats examples in some epochs; the order is asked for steps as a resume would."""
    pairs = [np.arange(10).reshape(-1, 2)[list(rows)] for rows in ((0, 1), (0, 1, 1, 2, 0), (3,))]
    plan = TrainingOrder(10, pairs.__getitem__, options=TrainingOptions(global_batch_size=4, epochs=3), seed=1)
    expected = [global_batches(epoch_units(10, pairs[e], epoch=e, seed=1), 4) for e in range(3)]
    assert [len(batches) for batches in expected] == [3, 4, 3]
    assert plan.ends == [3, 7, 10]
    whole = [(epoch, batch) for epoch in range(3) for batch in expected[epoch]]
    for step in (9, 2, 3, 8, 7, 0, 6, 1, 4, 5):
        assert (plan.epoch_of(step), plan.batch(step)) == whole[step]


def test_learning_rate_warms_up_and_decays():
    options = TrainingOptions(learning_rate=2.0, warmup_ratio=0.1)
    rates = [learning_rate(s, 95, options) for s in range(95)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)], rel=1e-15)
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * k / 85) for k in range(85)], rel=1e-15)
    assert np.all(np.array(rates) > 0)
    seven = TrainingOptions(learning_rate=7.0, warmup_ratio=0.07)  # times 100 is above 7 as a float
    assert [learning_rate(s, 100, seven) for s in range(8)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.0]
    flat = TrainingOptions(learning_rate=2.0, warmup_ratio=0.0, schedule="constant")
    assert {learning_rate(s, 7, flat) for s in range(7)} == {2.0}
    linear = TrainingOptions(learning_rate=2.0, warmup_ratio=0.0, schedule="linear")
    assert [learning_rate(s, 4, linear) for s in range(4)] == [2.0, 1.5, 1.0, 0.5]


def test_the_digest_of_a_batch_tells_its_rows_their_order_and_its_pairs():
    assert digest([(Slot(1), Slot(2)), (Slot(3),)]) == hashlib.sha256(b"[[1, 2], [3]]").hexdigest()[:16]


def test_an_epoch_is_held_as_arrays():
    """About 7 bytes a slot of a pair and 9 a single, where objects had 130; what is asked for is made anew."""
    rows, options = 100_000, TrainingOptions(global_batch_size=32)
    for pairs, most in ((np.random.default_rng(0).permutation(rows).reshape(-1, 2), 8), (None, 10)):
        tracemalloc.start()
        try:
            plan = TrainingOrder(rows, lambda epoch, pairs=pairs: pairs, options=options, seed=0)
            first = plan.batch(0)
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < most * rows
        assert peak < 50 * rows
        assert plan.batch(0) == first
        assert all(type(slot.row) is int and type(slot.ntp_weight) is float for unit in first for slot in unit)


def test_a_loop_over_runs_ends_with_the_last():
    runs = epoch_units(7, np.array([[0, 3], [1, 3]]), epoch=0, seed=0)
    rows = [[slot.row for slot in unit] for unit in runs]
    assert len(rows) == len(runs) == 6
    assert sorted(rows) == [[0, 3], [1, 3], [2], [4], [5], [6]]
    with pytest.raises(IndexError):
        runs[len(runs)]
