"""Training dynamics out of the run of a Trainer of transformers, or of one built on it, such as TRL's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from sftmix.common.rng import stable_hash
from sftmix.common.tables import PathLike, read_dynamics, write_dynamics
from sftmix.common.world import World
from sftmix.components.reference import numbered
from sftmix.functional import IGNORED
from sftmix.training.dynamics import checkpoint_steps, merge, one_checkpoint
from sftmix.training.module import TrainingModule
from sftmix.training.scoring import Scorer
from sftmix.types import Encoded


def row_ids(dataset: Dataset) -> list[str]:
    """Return the ids of tokenised rows: their column `id`, or a hash of their tokens; `#k` marks the k-th repeat."""
    named = "id" in dataset.column_names
    names = dataset["id"] if named else [f"{stable_hash(*tokens):032x}" for tokens in dataset["input_ids"]]
    return [f"{name}#{repeats}" if repeats else name for name, repeats in numbered(list(map(str, names)))]


class TrainerRows:
    """The tokenised data set of a Trainer (columns input_ids and labels) as rows to be scored."""

    def __init__(self, dataset: Dataset) -> None:
        self.ids, self._rows = row_ids(dataset), dataset.with_format("numpy")
        self.lengths = np.array([len(tokens) for tokens in dataset["input_ids"]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Encoded:
        example = self._rows[row]
        target = example["labels"] != IGNORED
        target[0] = False  # no position predicts the first token
        return Encoded(row, self.ids[row], example["input_ids"], target)


class DynamicsCallback(TrainerCallback):
    """Every row is scored at C steps of a Trainer's run, which is so the reference; the result is a dynamics file.

    All ranks score together. Where weights are sharded (FSDP, DeepSpeed ZeRO-3) it raises ValueError; there, keep
    checkpoints, and read them with the reference FromCheckpoints.
    """

    def __init__(self, dataset: Dataset, path: PathLike, *, checkpoints: int | list[float] = 5) -> None:
        """
        dataset: the Trainer's `train_dataset`, tokenised; its column `id` joins the scores with rows elsewhere.
        path: the dynamics file, which holds more after each scoring; a Trainer that resumes goes on with it.
        checkpoints: as of TrainedReference.
        """
        self._rows, self._path, self._checkpoints = TrainerRows(dataset), Path(path), checkpoints

    def on_train_begin(self, args, state, control, *, model, **kwargs):  # type: ignore[override]
        if any(hasattr(weight, "full_tensor") or not weight.numel() for weight in model.parameters()):
            raise ValueError("DynamicsCallback cannot score sharded weights: read checkpoints with FromCheckpoints")
        self._world = World(args.process_index, args.world_size, args.local_process_index, args.device)
        goes_on = state.global_step and self._path.exists()
        self._parts = self._world.share([read_dynamics(self._path)] if goes_on else [])
        self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args, state, control, *, model, **kwargs):  # type: ignore[override]
        step, steps = state.global_step, checkpoint_steps(self._checkpoints, state.max_steps)
        if step in steps and all(step > part.steps[-1] for part in self._parts):
            scorer = Scorer(world=self._world, precision="bf16" if args.bf16 else "fp32")
            self._parts += [one_checkpoint(self._rows.ids, step, scorer(TrainingModule(model), self._rows))]
            self._world.on_main(lambda: write_dynamics(self._path, merge(self._parts)))
