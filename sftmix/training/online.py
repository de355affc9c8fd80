"""Online losses: the loss of every example in its own training step, epoch by epoch, without an extra pass.

This is how Dataset Cartography (arXiv 2009.10795) collects training dynamics. An example's NLL is taken in its turn, in
training mode (dropout and perturbations on), under weights that change during the epoch. Scoring all examples at a
checkpoint has neither drawback, but costs a forward pass over all examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sftmix.common.errors import DataError
from sftmix.common.tables import read_dynamics, write_dynamics
from sftmix.common.world import World
from sftmix.training.dynamics import one_checkpoint, tell_lost
from sftmix.training.scoring import example_nll, gather_nll
from sftmix.types import NOT_COUNTED, Batch, BatchNLL, RowScores, TrainingDynamics


@dataclass
class OnlineLosses:
    """The NLL of each example in its turn; every finished epoch becomes a dynamics file of one checkpoint.

    ids        N example ids
    directory  holds `epoch-<3 digits>.parquet`, epochs from 0
    """

    ids: Sequence[str]
    directory: Path
    world: World
    _parts: list[BatchNLL] = field(default_factory=list, init=False)

    def record(self, losses: Iterable[tuple[Batch, torch.Tensor]]) -> None:
        """Keep this rank's micro-batches of a step, each with the NLL [T] of its token rows, on the device."""
        self._parts += [example_nll(batch, nll_T) for batch, nll_T in losses]

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return the losses of this epoch so far from all ranks, by row: `row` i64, `nll_sum` f64, `n_tokens` i64."""
        losses = gather_nll(self._parts, self.world)
        return {} if losses is None else {"row": losses.rows, "nll_sum": losses.nll_sum, "n_tokens": losses.n_tokens}

    def restore(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Continue in the middle of an epoch with the result of `gathered`; rank 0 keeps it."""
        self._parts = []
        if arrays and self.world.is_main:
            rows, nll_sum, n_tokens = (arrays[name].to(self.world.device) for name in ("row", "nll_sum", "n_tokens"))
            self._parts = [BatchNLL(rows, nll_sum, n_tokens)]

    def end_epoch(self, epoch: int, step: int) -> None:
        """Write the epoch that ends after `step` optimizer steps, if every example had its turn, and start the next.

        An example whose loss was not finite counts as not scored; its step was skipped, and where the examples of a
        micro-batch stand in one row without padding, those beside it are not finite either.
        """
        losses = gather_nll(self._parts, self.world)

        def write() -> None:
            if losses is not None and len(losses.rows) == len(self.ids):
                n_tokens = losses.n_tokens.numpy()
                not_counted = np.full(len(n_tokens), NOT_COUNTED, dtype=np.int64)
                dynamics = one_checkpoint(self.ids, step, RowScores(losses.nll_sum.numpy(), n_tokens, not_counted))
                write_dynamics(self.path(epoch), dynamics)
                tell_lost(dynamics, n_tokens, f"epoch {epoch + 1}")

        self._parts = []
        self.world.on_main(write)

    def path(self, epoch: int) -> Path:
        return self.directory / f"epoch-{epoch:03d}.parquet"

    def epochs(self) -> list[int]:
        """Return the epochs that are written, in order."""
        return sorted(int(path.stem.removeprefix("epoch-")) for path in self.directory.glob("epoch-*.parquet"))

    def read(self, epoch: int) -> TrainingDynamics:
        """Return the losses of one finished epoch, in the order of the ids."""
        if not self.path(epoch).exists():
            raise DataError(f"{self.path(epoch)} is missing: the losses of epoch {epoch + 1} decide what follows it")
        return read_dynamics(self.path(epoch)).of(self.ids)
