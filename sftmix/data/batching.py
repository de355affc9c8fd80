"""From pairs of rows to micro-batches, in three rooms: the order of an epoch (`epochs`), the share of each rank and
accumulation step (`micro`), and the aligned tensors (`collate`).

Everything is a pure function of (pairs, lengths, seed, epoch): any rank can work out what every rank does, and a
resumed run needs nothing but the step number.
"""

from __future__ import annotations

from sftmix.data.collate import RowSubset, TokenisedRows, collate, to_device
from sftmix.data.epochs import Slot, Unit, epoch_units, global_batches
from sftmix.data.micro import MicroStep, length_groups, micro_steps, token_slots

__all__ = [
    "MicroStep",
    "RowSubset",
    "Slot",
    "TokenisedRows",
    "Unit",
    "collate",
    "epoch_units",
    "global_batches",
    "length_groups",
    "micro_steps",
    "to_device",
    "token_slots",
]
