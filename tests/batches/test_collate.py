"""Order of an epoch, share of every rank, alignment of the pairs."""

import itertools
from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftmix.batches.collate import collate, length_groups
from sftmix.batches.order import Slot, epoch_units, global_batches
from sftmix.types import Split
from tests.toy import toy_rows


@st.composite
def an_epoch(draw):
    n = draw(st.integers(1, 60))
    rows = draw(st.permutations(range(n)))
    n_pairs = draw(st.integers(0, n // 2))
    pairs = np.array(rows[: 2 * n_pairs]).reshape(-1, 2)
    if n_pairs and draw(st.booleans()):  # the smaller group is repeated
        again = np.stack([pairs[:, 0], np.roll(pairs[:, 1], 1)], axis=1)[: draw(st.integers(0, n_pairs))]
        pairs = np.concatenate([pairs, again])
    return n, pairs.astype(np.int64)


@given(an_epoch(), st.integers(0, 5), st.sampled_from([2, 4, 6, 32]))
def test_every_row_carries_ntp_loss_once_and_batches_are_full(epoch_of, epoch, size):
    n, pairs = epoch_of
    units = epoch_units(n, pairs, epoch=epoch, seed=3)
    carried = Counter(slot.row for unit in units for slot in unit if slot.ntp_weight == 1.0)
    assert carried == Counter(range(n))
    assert [tuple(s.row for s in u) for u in units if len(u) == 2] == [tuple(p) for p in pairs.tolist()]
    batches = global_batches(units, size)
    assert [u for b in batches for u in b] == [*units]
    assert all(sum(len(u) for u in b) == size for b in [*batches][:-1])


def test_singles_are_spread_evenly_and_an_odd_one_comes_last():
    pairs = np.arange(160).reshape(-1, 2)
    units = epoch_units(171, pairs, epoch=0, seed=0)
    places = [k for k, u in enumerate(units) if len(u) == 1]
    assert len(places) == 11
    assert places[-1] == len(units) - 1
    first_of_two = np.array(places[:-1:2])
    assert np.diff(first_of_two).min() >= 80 // 5
    assert (np.array(places[1:-1:2]) == first_of_two + 1).all()


def test_unpaired_examples_have_an_order_of_their_own_in_every_epoch():
    """And in no epoch that of the file, or of another seed."""
    pairs = np.arange(20).reshape(-1, 2)

    def singles(epoch, seed):
        return tuple(u[0].row for u in epoch_units(70, pairs, epoch=epoch, seed=seed) if len(u) == 1)

    orders = [singles(epoch, seed) for epoch in range(3) for seed in (7, 8)]
    assert all(sorted(order) == list(range(20, 70)) for order in orders)
    assert len({*orders, tuple(range(20, 70))}) == 7
    assert singles(1, 7) == orders[2]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.data())
def test_length_groups_are_optimal(lengths, data):
    k = data.draw(st.integers(1, len(lengths)))
    _, groups = length_groups(lengths, k)
    assert len(groups) == k
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))

    def cost(parts):
        return sum(len(p) * max(p) for p in parts)

    ordered = sorted(lengths)
    places = itertools.combinations(range(1, len(ordered)), k - 1)
    best = min(cost([ordered[a:b] for a, b in itertools.pairwise((0, *c, len(ordered)))]) for c in places)
    assert cost([[lengths[i] for i in g] for g in groups]) == best


@given(st.integers(1, 4), st.integers(0, 1000))
def test_collate_aligns_nth_response_token_with_nth_response_token(n_segments, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 20, 6).tolist()
    n_response = [int(rng.integers(1, n - 1)) for n in lengths]
    data = toy_rows([(length - n, n) for length, n in zip(lengths, n_response, strict=True)])
    units = [(Slot(4), Slot(1)), (Slot(5),), (Slot(0), Slot(3, 0.0))]
    split = Split(np.array([0, 1, 0, 1, 0, -1], dtype=np.int8), ("confident", "unconfident"))
    batch = collate(units, data, n_segments=n_segments, split=split)

    assert batch.ids == tuple(f"example-{row}" for row in (4, 1, 5, 0, 3))
    assert batch.ntp_weight.tolist() == [1, 1, 1, 1, 0]
    assert batch.group.tolist() == [0, 1, -1, 0, 1]
    expected = [data[r].input_ids[data[r].target] for r in (4, 1, 5, 0, 3)]
    assert batch.labels.tolist() == np.concatenate(expected).tolist()
    assert batch.slot.tolist() == [b for b, e in enumerate(expected) for _ in e]

    seen = {}
    for m, (i, j) in enumerate(batch.pairs.tolist()):
        a, b = batch.slot_pairs[batch.pair_index[m]].tolist()
        place_i, place_j = (int((batch.slot[:t] == s).sum()) for t, s in ((i, a), (j, b)))
        assert (int(batch.slot[i]), int(batch.slot[j])) == (a, b)
        assert place_i == place_j == seen.get((a, b), 0)
        seen[a, b] = place_i + 1
    for (a, b), count in seen.items():
        assert count == min(len(expected[a]), len(expected[b]))
    assert set(seen) == {(0, 1), (3, 4)}

    # The hidden state gathered for a token row stands one position before its label, in the right sequence.
    token_at = torch.full((len(batch.labels),), -1)
    assert len(batch.segments) == n_segments
    for segment in batch.segments:
        flat = segment.input_ids.flatten()
        assert segment.attention_mask.flatten()[segment.index + 1].all()
        token_at[segment.order] = flat[segment.index + 1]
    assert torch.equal(token_at, batch.labels)
