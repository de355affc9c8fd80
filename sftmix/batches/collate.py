"""The tensors of one micro-batch, padded or in one row without padding, with pairs aligned by response token.

Examples of similar length are padded together; `length_groups` finds the groups with the least padding.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from sftmix.batches.order import Slot, TokenisedRows, Unit
from sftmix.functional import align
from sftmix.ranks.transfer import send
from sftmix.types import Batch, Encoded, Int64, PromptTokens, Segment, Split


def collate(
    units: Sequence[Unit],
    data: TokenisedRows,
    *,
    n_segments: int = 1,
    padding_free: bool = False,
    split: Split | None = None,
    pad_id: int = 0,
    prompts: bool = False,
) -> Batch:
    """Build the Batch of one rank: token rows of all slots in unit order, pairs aligned by response token.

    n_segments    groups of similar length, each padded to its longest; if there are fewer slots, the others are idle
    padding_free  put all slots one after the other into a single row; position ids keep them apart
    prompts       also give the tokens of the prompts (Need.PROMPTS)
    """
    slots: list[Slot] = []
    slot_pairs = []
    for unit in units:
        if len(unit) == 2:
            # units (4,), (0, 3): slots 0 1 2 are rows 4 0 3, and the pair is slots 1 and 2
            slot_pairs.append((len(slots), len(slots) + 1))
        slots += unit
    encoded = [data[slot.row] for slot in slots]
    # The token at position t is predicted at t - 1; the first token of a sequence is predicted by nothing.
    targets = [np.flatnonzero(e.target[1:]) + 1 for e in encoded]
    labels, slot, token_rows = _tokens(encoded, targets)
    slot_pairs_P2 = torch.tensor(slot_pairs, dtype=torch.int64).reshape(-1, 2)  # [0, 2] without any
    pairs, pair_index = align(torch.tensor([len(t) for t in targets]), slot_pairs_P2)
    rows = np.array([s.row for s in slots])
    group = np.full(len(slots), -1) if split is None else split.group[rows].astype(np.int64)
    prompt, places = None, targets
    if prompts:
        of_prompts = list(map(_prompt_places, encoded, targets))
        labels_Q, slot_Q, rows_Q = _tokens(encoded, of_prompts, first=len(labels))
        prompt = PromptTokens(labels_Q, slot_Q)
        places = list(map(np.concatenate, zip(targets, of_prompts, strict=True)))
        token_rows = list(map(torch.cat, zip(token_rows, rows_Q, strict=True)))
    layout = _layout([len(e.input_ids) for e in encoded], n_segments, padding_free=padding_free)
    return Batch(
        ids=tuple(e.id for e in encoded),
        rows=torch.from_numpy(rows),
        ntp_weight=torch.tensor([s.ntp_weight for s in slots], dtype=torch.float32),
        group=torch.from_numpy(group),
        n_groups=0 if split is None else len(split.names),
        labels=labels,
        slot=slot,
        slot_pairs=slot_pairs_P2,
        pairs=pairs,
        pair_index=pair_index,
        segments=tuple(_segment(lines, encoded, places, token_rows, pad_id) for lines in layout),
        weight=_token_weights(encoded, targets),
        examples=tuple(encoded),
        prompt=prompt,
    )


def _tokens(
    encoded: Sequence[Encoded], places: Sequence[Int64], first: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]:
    """Return the tokens at these places of each slot, the slot of each, and their numbers, by slot, from `first` on."""
    counts = [len(of_slot) for of_slot in places]
    labels = np.concatenate([example.input_ids[at] for example, at in zip(encoded, places, strict=True)])
    slot = torch.repeat_interleave(torch.tensor(counts))  # counts 3 2 1 -> 0 0 0 1 1 2
    rows = torch.arange(first, first + len(labels)).split(counts)  # (0 1 2), (3 4), (5)
    return torch.from_numpy(labels.astype(np.int64)), slot, rows


def _prompt_places(example: Encoded, targets: Int64) -> Int64:
    """Return the places in an example that hold no response token, nor the first token of a document."""
    first = [0] if example.starts is None else example.starts
    return np.setdiff1d(np.arange(len(example.input_ids)), np.concatenate([targets, first]).astype(np.int64))


def _token_weights(encoded: Sequence[Encoded], targets: Sequence[Int64]) -> torch.Tensor | None:
    """Return f32[T], the rows' own weights of the response tokens, which are 1 elsewhere; None if no row has any."""
    if all(e.weight is None for e in encoded):
        return None
    of_slots = zip(encoded, targets, strict=True)
    weights = [np.ones(len(t), np.float32) if e.weight is None else e.weight[t] for e, t in of_slots]
    return torch.from_numpy(np.concatenate(weights))


def _layout(lengths: Sequence[int], n_segments: int, *, padding_free: bool) -> list[list[list[int]]]:
    """Return the slots of each line of each segment: one line for all, or a line for each slot, in groups by length."""
    if padding_free:
        return [[list(range(len(lengths)))]]
    _, groups = length_groups(lengths, min(n_segments, len(lengths)))
    idle: list[list[int]] = [[]]  # one line without a slot
    return [[[slot] for slot in alike] for alike in groups] + [idle] * (n_segments - len(groups))


def _segment(
    lines: Sequence[Sequence[int]],
    encoded: Sequence[Encoded],
    targets: Sequence[Int64],
    token_rows: Sequence[torch.Tensor],
    pad_id: int,
) -> Segment:
    """Pad lines to the longest; in a line, examples follow one another. An idle segment is one token.

    Positions count from the beginning of each document: of each example, and of each document packed into one. They are
    None if no line holds two. Padding is one more document: nothing reads its results, and no other attends to it.

    lines       the slots of each line
    targets     for each slot i64, places of the response tokens in the example, and those of its prompt if asked for
    token_rows  for each slot i64, places of these tokens among the batch's response tokens, and behind them
    """
    width = max(1, *(sum(len(encoded[slot].input_ids) for slot in line) for line in lines))
    input_ids = np.full((len(lines), width), pad_id, dtype=np.int64)
    mask, positions = np.zeros_like(input_ids), np.zeros_like(input_ids)
    empty = np.zeros(0, dtype=np.int64)
    index = [empty]
    order = [torch.from_numpy(empty)]
    starts = list[int]()
    several = False
    for b, line in enumerate(lines):
        start = 0
        documents = list[int]()
        for slot in line:
            example = encoded[slot]
            end = start + len(example.input_ids)
            input_ids[b, start:end] = example.input_ids
            index.append(b * width + start + targets[slot] - 1)  # the state one place before predicts the token
            order.append(token_rows[slot])  # lines are sorted by length, so tokens are not in the batch's order
            documents += [start] if example.starts is None else (start + example.starts).tolist()
            start = end
        mask[b, : max(1, start)] = 1  # also the token of an idle segment, which so needs no mask
        several |= len(documents) > 1
        documents += [start] if start < width else []  # the padding
        starts += [b * width + document for document in documents]
        for first, last in itertools.pairwise([*documents, width]):  # rows of 5, 3 and 2 tokens: 01234 012 01
            positions[b, first:last] = np.arange(last - first)
    slots = [slot for line in lines for slot in line]
    return Segment(
        slots=tuple(slots),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        index=torch.from_numpy(np.concatenate(index)),
        order=torch.cat(order),
        starts=torch.tensor([*starts, len(lines) * width], dtype=torch.int32),  # rows of 5, 3, 2: 0 5 8 10
        position_ids=torch.from_numpy(positions) if several else None,
        lengths=tuple(len(encoded[slot].input_ids) for slot in slots) if len(slots) > len(lines) else None,
        padded=not mask.all(),
    )


def to_device(record: Any, device: torch.device) -> Any:
    """Return a Batch or a Plan of the host, or a part of one, with every tensor on `device`, without waiting for it."""
    if isinstance(record, torch.Tensor):
        return send(record, device)
    if is_dataclass(record) and not isinstance(record, (type, Encoded)):  # an example holds no tensors
        return replace(record, **{f.name: to_device(getattr(record, f.name), device) for f in fields(record)})
    return tuple(to_device(value, device) for value in record) if isinstance(record, tuple) else record


# ------------------------------------------------------------------------------------------------------- length groups


def token_slots(lengths: Sequence[int], n_segments: int, *, padding_free: bool = False) -> int:
    """Count the token slots of examples of these lengths: padded in up to `n_segments` groups, or not padded."""
    if padding_free or n_segments >= len(lengths):
        return sum(lengths)
    if n_segments == 1:
        return len(lengths) * max(lengths)
    return length_groups(lengths, n_segments)[0]


def length_groups(lengths: Sequence[int], n_groups: int) -> tuple[int, list[list[int]]]:
    """Partition slots into exactly `n_groups` groups of similar length with the fewest token slots; return both.

    In order of length the best groups are runs of neighbours, so a small dynamic programme finds them. The cost of a
    group is its size times its longest member.
    """
    # Lengths 5 3 2 9 in two groups: 2 and 3 padded to 3, 5 and 9 padded to 9, which are 6 + 18 token slots.
    longest = np.sort(np.array([0.0, *lengths]))  # of a group that ends at i
    at = np.arange(len(longest))
    group = np.where(at[:, None] < at, (at - at[:, None]) * longest, np.inf)  # [start, end]
    best = np.where(at == 0, 0.0, np.inf)  # slots of the first i examples in the groups so far; no group is empty
    cuts = []  # for each group its start if it ends at i
    for _ in range(n_groups):
        cost = best[:, None] + group
        cuts.append(np.argmin(cost, axis=0))
        best = np.min(cost, axis=0)
    order = np.argsort(lengths, kind="stable").tolist()
    groups = []
    end = len(order)
    for starts in reversed(cuts):  # the last group begins where its cut says, and there the one before it ends
        start = int(starts[end])
        groups.append(order[start:end])
        end = start
    return int(best[-1]), groups[::-1]
