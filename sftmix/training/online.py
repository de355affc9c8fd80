"""Online losses: the loss of every example in its own training step, epoch by epoch, without an extra pass.

This is how Dataset Cartography (arXiv 2009.10795) collects training dynamics. An example's NLL is taken in its turn, in
training mode (dropout and perturbations on), under weights that change during the epoch. Scoring all examples at a
checkpoint has neither drawback, but costs a forward pass over all examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sftmix.batches.order import Unit
from sftmix.common.errors import DataError
from sftmix.common.tables import read_dynamics, write_dynamics
from sftmix.common.world import World
from sftmix.training.dynamics import one_checkpoint, tell_lost
from sftmix.training.module import autocast, unwrap
from sftmix.training.scoring import example_nll, gather_nll, scoring_plan
from sftmix.training.step import StepSetup, micro_batches
from sftmix.types import NOT_COUNTED, Batch, BatchNLL, RowScores, Split, TrainingDynamics


class OnlineLosses:
    """The NLL of each example in its turn; every finished epoch becomes a dynamics file of one checkpoint.

    ids        N example ids
    directory  holds `epoch-<3 digits>.parquet`, epochs from 0
    """

    def __init__(self, ids: Sequence[str], directory: Path, world: World) -> None:
        self._ids, self._directory, self._world = ids, directory, world
        self._parts: list[BatchNLL] = []

    def record(self, losses: Iterable[tuple[Batch, torch.Tensor]]) -> None:
        """Keep this rank's micro-batches of a step, each with the NLL [T] of its token rows, on the device."""
        self._parts += [example_nll(batch, nll_T) for batch, nll_T in losses]

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return the losses of this epoch so far from all ranks, by row: `row` i64, `nll_sum` f64, `n_tokens` i64."""
        found = gather_nll(self._parts, self._world)
        return {} if found is None else {"row": found.rows, "nll_sum": found.nll_sum, "n_tokens": found.n_tokens}

    def restore(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Continue in the middle of an epoch with the result of `gathered`; rank 0 keeps it."""
        self._parts = []
        if arrays and self._world.is_main:
            self._parts = [BatchNLL(*(arrays[name].to(self._world.device) for name in ("row", "nll_sum", "n_tokens")))]

    def end_epoch(self, epoch: int, step: int) -> None:
        """Write the epoch that ends after `step` optimizer steps, if every example had its turn, and start the next.

        An example whose loss was not finite (its step was skipped) counts as not scored.
        """
        found = self.gathered()

        def write() -> None:
            if found and len(found["row"]) == len(self._ids):
                n_tokens = found["n_tokens"].numpy()
                not_counted = np.full(len(n_tokens), NOT_COUNTED, dtype=np.int64)
                dynamics = one_checkpoint(self._ids, step, RowScores(found["nll_sum"].numpy(), n_tokens, not_counted))
                write_dynamics(self.path(epoch), dynamics)
                tell_lost(dynamics, n_tokens, f"epoch {epoch + 1}")

        self._parts = []
        self._world.on_main(write)

    def path(self, epoch: int) -> Path:
        return self._directory / f"epoch-{epoch:03d}.parquet"

    def epochs(self) -> list[int]:
        """Return the epochs that are written, in order."""
        return sorted(int(path.stem.removeprefix("epoch-")) for path in self._directory.glob("epoch-*.parquet"))

    def read(self, epoch: int) -> TrainingDynamics:
        """Return the losses of one finished epoch, in the order of the ids."""
        if not self.path(epoch).exists():
            raise DataError(f"{self.path(epoch)} is missing: the losses of epoch {epoch + 1} decide what follows it")
        return read_dynamics(self.path(epoch)).of(self._ids)


@torch.no_grad()
def padded_losses(
    setup: StepSetup, step: int, units: Sequence[Unit], split: Split | None
) -> list[tuple[Batch, torch.Tensor]]:
    """Compute the losses of a skipped step again, with padding; the weights are still those of the step.

    If examples share a row, one non-finite value spoils all: attention multiplies masked values by 0, and 0 times NaN
    is NaN. Every rank skips the same steps, so all ranks make this forward.
    """
    world, module, perturb = setup.world, setup.module, setup.perturb(step)
    batches = micro_batches(
        units, setup.data, setup.options, world, module, split=split, pad_id=setup.pad_id, padded=True
    )
    with autocast(module, setup.precision, world.device):
        return [(batch, unwrap(module)(batch, scoring_plan(batch), perturb=perturb).nll) for batch in batches]
