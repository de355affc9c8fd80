"""From pairs of rows to micro-batches: the order of an epoch, the share of each rank, and the aligned tensors.

Everything here is a pure function of (pairs, lengths, seed, epoch): any rank can work out what every rank does, and a
resumed run needs nothing but the step number.

A *unit* is what must stay in one micro-batch: a pair of slots, or a single slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sftmix.rng import generator
from sftmix.types import Batch, Encoded, Rows, Segment, Split

if TYPE_CHECKING:
    import torch


class TokenisedRows(Protocol):
    """What batching needs of a data set: its length, token counts per row, and rows."""

    @property
    def lengths(self) -> Rows: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class RowSubset:
    """Some rows of a data set, in the given order, as a data set."""

    data: TokenisedRows
    rows: Rows

    @property
    def lengths(self) -> Rows:
        return self.data.lengths[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Encoded:
        return self.data[int(self.rows[row])]


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a batch. A repeat of a row that already had its turn in this epoch has `ntp_weight` 0."""

    row: int
    ntp_weight: float = 1.0


Unit = tuple[Slot, ...]


# ------------------------------------------------------------------------------------ order of an epoch


def epoch_units(n_rows: int, pairs: Rows | None, *, epoch: int, seed: int) -> list[Unit]:
    """Units of one epoch, in training order; every row carries NTP loss exactly once.

    pairs: i64[P, 2] from the pair sampler, or None for an epoch of shuffled singles. Rows in no pair are shuffled and
    spread evenly among the pairs, two at a time, so that every global batch but the last is full.
    """
    if pairs is None:
        order = generator(seed, "order", epoch).permutation(n_rows)
        return [(Slot(int(r)),) for r in order]
    seen = np.zeros(n_rows, dtype=bool)
    paired: list[Unit] = []
    for couple in pairs.tolist():
        slots = []
        for row in couple:
            slots.append(Slot(row, 0.0 if seen[row] else 1.0))
            seen[row] = True
        paired.append(tuple(slots))
    singles = np.flatnonzero(~seen)
    singles = singles[generator(seed, "singles", epoch).permutation(len(singles))]
    return _spread(paired, [(Slot(int(r)),) for r in singles])


def _spread(paired: list[Unit], singles: list[Unit]) -> list[Unit]:
    """Merge single units evenly into the pairs, in neighbouring twos; an odd one comes last."""
    odd = [singles.pop()] if len(singles) % 2 else []
    twos = len(singles) // 2
    total = len(paired) + twos
    places = {int((k + 0.5) * total / twos) for k in range(twos)} if twos else set()
    pair_iter, single_iter = iter(paired), iter(singles)
    merged: list[Unit] = []
    for place in range(total):
        merged += itertools.islice(single_iter, 2) if place in places else itertools.islice(pair_iter, 1)
    return merged + odd


def global_batches(units: Sequence[Unit], global_batch_size: int) -> list[list[Unit]]:
    """Cut the epoch into global batches of `global_batch_size` slots; the last may be short."""
    batches: list[list[Unit]] = [[]]
    room = global_batch_size
    for unit in units:
        if len(unit) > room:
            batches.append([])
            room = global_batch_size
        batches[-1].append(unit)
        room -= len(unit)
    return batches if batches[-1] else batches[:-1]


# ------------------------------------------------------------------------------- share of every rank


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One forward and backward on every rank at once: units of each rank, and into how many segments each pads them."""

    ranks: tuple[tuple[Unit, ...], ...]
    n_segments: int


def micro_steps(
    units: Sequence[Unit], lengths: Rows, *, world_size: int, micro_batch_size: int, max_segments: int
) -> list[MicroStep]:
    """Deal one global batch out to ranks and accumulation steps, never cutting a unit, balanced by tokens.

    A rank left without a unit (the short last batch) repeats one with NTP weight 0, so that it joins every collective.
    The number of segments is the same on all ranks of a micro-step: FSDP gathers parameters once per segment.
    """
    n_slots = sum(len(u) for u in units)
    n_bins = world_size * -(-n_slots // (world_size * micro_batch_size))
    bins: list[list[Unit]] = [[] for _ in range(n_bins)]
    tokens, room = np.zeros(n_bins), np.full(n_bins, micro_batch_size)
    weight = {u: sum(int(lengths[s.row]) for s in u) for u in units}
    for unit in sorted(units, key=lambda u: (-len(u), -weight[u])):
        best = int(np.argmin(np.where(room >= len(unit), tokens, np.inf)))
        if room[best] < len(unit):
            raise ValueError(f"a pair does not fit: micro_batch_size {micro_batch_size} must be even")
        bins[best].append(unit)
        tokens[best] += weight[unit]
        room[best] -= len(unit)
    filler = (replace(units[0][0], ntp_weight=0.0),)
    filled = [tuple(b) or (filler,) for b in bins]
    steps = []
    for start in range(0, n_bins, world_size):
        ranks = tuple(filled[start : start + world_size])
        fewest = min(sum(len(u) for u in rank) for rank in ranks)
        steps.append(MicroStep(ranks, min(max_segments, fewest)))
    return steps


def length_groups(lengths: Sequence[int], n_groups: int) -> list[list[int]]:
    """Partition slots into exactly `n_groups` groups of similar length with the fewest padded tokens.

    Sorted by length the best groups are contiguous, so a small dynamic programme finds them: cost of a group is its
    size times its longest member.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    size = len(order)
    best = np.full((n_groups + 1, size + 1), np.inf)
    cut = np.zeros((n_groups + 1, size + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for g in range(1, n_groups + 1):
        for end in range(g, size + 1):
            cost = best[g - 1, :end] + (end - np.arange(end)) * lengths[order[end - 1]]
            cut[g, end] = np.argmin(cost)
            best[g, end] = cost[cut[g, end]]
    groups, end = [], size
    for g in range(n_groups, 0, -1):
        start = int(cut[g, end])
        groups.append(order[start:end])
        end = start
    return groups[::-1]


# ---------------------------------------------------------------------------------------------- tensors


def collate(
    units: Sequence[Unit], data: TokenisedRows, *, n_segments: int = 1, split: Split | None = None, pad_id: int = 0
) -> Batch:
    """Build the Batch of one rank: token rows of all slots in unit order, pairs aligned by response token."""
    import torch

    slots = [slot for unit in units for slot in unit]
    encoded = [data[slot.row] for slot in slots]
    # The token at position t is predicted at t - 1; the first token of a sequence is predicted by nothing.
    targets = [np.flatnonzero(e.target[1:]) + 1 for e in encoded]
    counts = np.array([len(t) for t in targets], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    labels = np.concatenate([e.input_ids[t] for e, t in zip(encoded, targets, strict=True)])
    slot_pairs, pairs, pair_index = _align(units, counts, offsets)
    rows = np.array([s.row for s in slots], dtype=np.int64)
    group = np.full(len(slots), -1, dtype=np.int64) if split is None else split.group[rows].astype(np.int64)
    segments = tuple(
        _segment(members, [(encoded[i], targets[i], int(offsets[i])) for i in members], pad_id)
        for members in length_groups([len(e.input_ids) for e in encoded], n_segments)
    )
    return Batch(
        ids=tuple(e.id for e in encoded),
        rows=torch.from_numpy(rows),
        ntp_weight=torch.tensor([s.ntp_weight for s in slots], dtype=torch.float32),
        group=torch.from_numpy(group),
        n_groups=0 if split is None else len(split.names),
        labels=torch.from_numpy(labels.astype(np.int64)),
        slot=torch.from_numpy(np.repeat(np.arange(len(slots)), counts)),
        slot_pairs=torch.from_numpy(slot_pairs),
        pairs=torch.from_numpy(pairs),
        pair_index=torch.from_numpy(pair_index),
        segments=segments,
    )


def _align(units: Sequence[Unit], counts: Rows, offsets: Rows) -> tuple[Rows, Rows, Rows]:
    """n-th response token with n-th response token, n <= min(N_c, N_u), for every unit of two (T28)."""
    firsts = np.cumsum([0] + [len(u) for u in units])[:-1]
    slot_pairs = np.array([(f, f + 1) for f, u in zip(firsts, units, strict=True) if len(u) == 2], dtype=np.int64)
    slot_pairs = slot_pairs.reshape(-1, 2)
    depth = counts[slot_pairs].min(axis=1, initial=np.iinfo(np.int64).max)
    n = np.concatenate([np.arange(d) for d in depth]) if len(depth) else np.zeros(0, dtype=np.int64)
    pair_index = np.repeat(np.arange(len(slot_pairs)), depth)
    pairs = offsets[slot_pairs[pair_index]] + n[:, None]
    return slot_pairs, pairs.astype(np.int64), pair_index.astype(np.int64)


def _segment(slots: Sequence[int], members: Sequence[tuple[Encoded, Rows, int]], pad_id: int) -> Segment:
    import torch

    width = max(len(encoded.input_ids) for encoded, _, _ in members)
    input_ids = np.full((len(members), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(members), width), dtype=np.int64)
    index, order = [], []
    for b, (encoded, targets, offset) in enumerate(members):
        ids = encoded.input_ids
        input_ids[b, : len(ids)] = ids
        mask[b, : len(ids)] = 1
        index.append(b * width + targets - 1)
        order.append(offset + np.arange(len(targets)))
    return Segment(
        torch.tensor(slots, dtype=torch.int64),
        torch.from_numpy(input_ids),
        torch.from_numpy(mask),
        torch.from_numpy(np.concatenate(index)),
        torch.from_numpy(np.concatenate(order)),
        _position_ids([encoded for encoded, _, _ in members], width),
    )


def _position_ids(members: Sequence[Encoded], width: int) -> torch.Tensor | None:
    """i64[b, width], counted from the beginning of each packed document; None where no example holds two of them.

    Padding is one more document: what it attends to is nobody's business, and nothing attends to what follows it.
    """
    import torch

    if all(encoded.starts is None or len(encoded.starts) == 1 for encoded in members):
        return None
    positions = np.empty((len(members), width), dtype=np.int64)
    for b, encoded in enumerate(members):
        inner = [0] if encoded.starts is None else encoded.starts.tolist()
        for start, end in itertools.pairwise([*inner, len(encoded.input_ids), width]):
            positions[b, start:end] = np.arange(end - start)
    return torch.from_numpy(positions)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    import torch

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, Segment):
            return replace(value, **{name: move(getattr(value, name)) for name in Segment.__slots__})
        return tuple(move(v) for v in value) if isinstance(value, tuple) else value

    return replace(batch, **{name: move(getattr(batch, name)) for name in Batch.__slots__})
