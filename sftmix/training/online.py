"""Online losses: what every example cost while it was trained on, epoch by epoch, at no extra pass.

This is how Dataset Cartography (arXiv 2009.10795) collects training dynamics. An example's NLL is taken when its turn
comes, in training mode (dropout and perturbations on) and under weights that move on during the epoch; scoring all
examples at a checkpoint has neither, and costs a forward pass of everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sftmix.common.errors import DataError
from sftmix.common.tables import read_dynamics, write_dynamics
from sftmix.common.world import World
from sftmix.training.scoring import per_slot
from sftmix.types import NOT_COUNTED, Batch, TrainingDynamics


class OnlineLosses:
    """Collects the NLL of each example in its turn; every finished epoch is a dynamics file of one checkpoint.

    ids        N example ids
    directory  holds `epoch-<3 digits>.parquet`, epochs from 0
    """

    def __init__(self, ids: Sequence[str], directory: Path, world: World) -> None:
        self._ids, self._directory, self._world = ids, directory, world
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def record(self, batch: Batch, nll_T: torch.Tensor) -> None:
        """Note a micro-batch that was just trained on; nothing leaves the device yet."""
        own = batch.ntp_weight > 0  # repeats and fillers have their turn elsewhere
        count = torch.bincount(batch.slot, minlength=len(batch.ids))
        self._parts.append((batch.rows[own], per_slot(batch, nll_T.detach())[own], count[own]))

    def take_back(self, n_batches: int) -> None:
        """Forget the last so many micro-batches, one or more."""
        del self._parts[-n_batches:]

    def gathered(self) -> dict[str, torch.Tensor]:
        """Everything noted in this epoch on all ranks, by row: `row` i64, `nll_sum` f64, `n_tokens` i64."""
        mine = [torch.cat(columns).cpu().numpy() for columns in zip(*self._parts, strict=True)]
        ranks = [part for part in self._world.gather(mine) if part]
        if not ranks:
            return {}
        row, nll_sum, n_tokens = (np.concatenate(columns) for columns in zip(*ranks, strict=True))
        order = np.argsort(row)
        found = {"row": row[order], "nll_sum": nll_sum[order], "n_tokens": n_tokens[order]}
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def restore(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Go on in the middle of an epoch with what `gathered` returned; rank 0 keeps it."""
        known = self._world.is_main and bool(arrays)
        part = [arrays[name].to(self._world.device) for name in ("row", "nll_sum", "n_tokens")] if known else []
        self._parts = [(part[0], part[1], part[2])] if part else []

    def end_epoch(self, epoch: int, step: int) -> None:
        """Write the epoch that ends after `step` optimizer steps, if every example had its turn, and start the next.

        An example whose loss was not finite (its step was skipped) counts as not scored.
        """
        found = self.gathered()
        if found and len(found["row"]) == len(self._ids) and self._world.is_main:
            dynamics = self._dynamics(found, step)
            write_dynamics(self.path(epoch), dynamics)
            lost = np.flatnonzero(~dynamics.scored)
            if len(lost):
                names = [self._ids[row] for row in lost[:5]]
                print(
                    f"epoch {epoch + 1}: {len(lost)} of {len(self._ids)} examples had no finite loss and count as not "
                    f"scored: {names}",
                    flush=True,
                )
        self._parts = []
        self._world.barrier()

    def _dynamics(self, found: Mapping[str, torch.Tensor], step: int) -> TrainingDynamics:
        nll_sum = found["nll_sum"].numpy()
        finite = np.isfinite(nll_sum)
        count = np.where(finite, found["n_tokens"].numpy(), 0)
        return TrainingDynamics(
            ids=self._ids,
            steps=np.array([step], dtype=np.int64),
            nll_sum=np.where(finite, nll_sum, 0.0)[:, None],
            n_tokens=count,
            n_correct=np.full((len(count), 1), NOT_COUNTED, dtype=np.int64),
        )

    def path(self, epoch: int) -> Path:
        return self._directory / f"epoch-{epoch:03d}.parquet"

    def epochs(self) -> list[int]:
        """The epochs that are written, in order."""
        return sorted(int(path.stem.removeprefix("epoch-")) for path in self._directory.glob("epoch-*.parquet"))

    def read(self, epoch: int) -> TrainingDynamics:
        """The losses of one finished epoch, in the order of the ids."""
        if not self.path(epoch).exists():
            raise DataError(f"{self.path(epoch)} is missing: the losses of epoch {epoch + 1} decide what follows it")
        return read_dynamics(self.path(epoch)).of(self._ids)
