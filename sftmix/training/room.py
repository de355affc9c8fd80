"""Room on the disk for the checkpoints to come, looked for before the first step."""

from __future__ import annotations

from torch import nn

from sftmix.common.files import check_room
from sftmix.training.checkpoint import CheckpointStore

_MARGIN = 1.2
"""Bytes for each byte of an estimate: a checkpoint holds more than weights and the state of the optimizer."""


def check_room_for_checkpoints(
    store: CheckpointStore, module: nn.Module, *, state_bytes: float, saves: int, best_copies: int
) -> None:
    """Raise NoSpaceError on every rank if the disk has too little room for the checkpoints to come.

    state_bytes  bytes of the optimizer's state per trained number
    saves        number of checkpoints still to be saved, at least 1
    best_copies  copies of the best weights to come, at most at one time
    """

    def check() -> None:
        needed = bytes_to_come(store, module, state_bytes=state_bytes, saves=saves, best_copies=best_copies)
        check_room(store.directory, needed, "the checkpoints to come")

    store.world.on_main(check)


def bytes_to_come(
    store: CheckpointStore, module: nn.Module, *, state_bytes: float, saves: int, best_copies: int
) -> int:
    """Return the bytes that the checkpoints to come take beside what stands, at most at one time, on rank 0.

    The oldest checkpoint goes when the new one stands: once `store.keep` stand, one more must fit. Each takes what the
    newest one takes; the first ones, what weights and optimizer take by an estimate. Arguments as above.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in trained)
    each = store.newest_bytes()
    if each is None:
        each = int(_MARGIN * (weights + state_bytes * sum(p.numel() for p in trained)))
    more = min(saves, max(1, store.keep + 1 - len(store.steps())))
    return each * more + best_copies * int(_MARGIN * weights)
