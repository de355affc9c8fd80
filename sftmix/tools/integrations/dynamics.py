"""Training dynamics out of any Trainer's run: its rows, scored at some of its steps."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import TrainerCallback

from sftmix.components.component import require
from sftmix.components.reference import SCORINGS, are_scorings, numbered
from sftmix.disk.tables import PathLike, read_dynamics, write_dynamics
from sftmix.functional import IGNORED
from sftmix.model.head import ADAPTER, check_head
from sftmix.ranks.rng import stable_hash
from sftmix.ranks.world import World
from sftmix.training.dynamics import checkpoint_steps, merge_dynamics, one_checkpoint
from sftmix.training.module import TrainingModule
from sftmix.training.scoring import Scorer
from sftmix.types import Encoded, TrainingDynamics
from sftmix.words.errors import DataError

# Columns of a row that may keep some of its tokens from others, and whether they do.
APART = {
    "attention_mask": lambda mask: mask != sorted(mask, reverse=True),  # 0 0 1 1, and the 1 1 2 2 of a bin
    "position_ids": lambda places: places != [*range(len(places))],
    "seq_lengths": lambda lengths: len(lengths) > 1,  # TRL's, of a bin
}


def check_adapter(model: Any) -> None:
    """Raise ValueError for a head with an adapter that `Head` does not read."""
    layer = model.get_output_embeddings()
    names = getattr(layer, "active_adapters", [ADAPTER])
    # IA3, OFT and LoHa have base layers as LoRA has, but no lora_bias; aLoRA and KaSA are variants of LoRA
    more = getattr(layer, "lora_bias", {"": hasattr(layer, "base_layer")}) | getattr(layer, "lora_variant", {})
    if names != [ADAPTER] or any(more.values()):
        raise ValueError(
            f"the LM head has adapters {names} ({type(layer).__name__} of {type(layer).__module__}); SFTMix reads one "
            f"of LoRA without lora_bias or a variant, or of modules_to_save, by the name '{ADAPTER}': make it so, or "
            "leave the head out"
        )


def row_ids(dataset: Dataset) -> list[str]:
    """Return the ids of tokenised rows: their column `id`, or a hash of their tokens; `#k` marks the k-th repeat."""
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"train_dataset is a {kind}; SFTMix takes rows by their number: use a datasets.Dataset")
    dataset = dataset.with_format(None)  # a tensor has another text than its number
    named = "id" in dataset.column_names
    names = dataset["id"] if named else [f"{stable_hash(*tokens):032x}" for tokens in dataset["input_ids"]]
    return [f"{name}#{repeats}" if repeats else name for name, repeats in numbered(list(map(str, names)))]


class TrainerRows:
    """The tokenised data set of a Trainer (columns input_ids and labels) as rows to be scored."""

    def __init__(self, dataset: Dataset) -> None:
        self.ids, self._rows = row_ids(dataset), dataset.with_format("numpy")
        if missing := {"input_ids", "labels"} - {*dataset.column_names}:
            raise ValueError(
                f"the rows have no column {', '.join(sorted(missing))} (they have {dataset.column_names}); scored are "
                "the tokens that labels names: give each row its input_ids, with -100 for a token that is not trained"
            )
        if seen := {"pixel_values", "image", "images", "videos"} & {*dataset.column_names}:
            raise ValueError(
                f"the rows have {', '.join(sorted(seen))}, and tokens alone are scored, without what these show; if "
                "that is meant, give DynamicsCallback rows without these columns"
            )
        plain = dataset.with_format(None)
        for name in APART.keys() & dataset.column_names:
            for row, values in zip(self.ids, plain[name], strict=True):
                if APART[name](values):
                    raise ValueError(
                        f"by its {name}, row {row} has padding before tokens, or several documents, and the tokens of "
                        "a row are scored as one document, from the first token on; give DynamicsCallback rows of one "
                        "document each, and leave padding to the Trainer's collator (on the right it does no harm)"
                    )
        self.lengths = np.array([len(tokens) for tokens in plain["input_ids"]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Encoded:
        example = self._rows[row]
        target = example["labels"] != IGNORED
        target[:1] = False  # no position predicts the first token
        return Encoded(row, self.ids[row], example["input_ids"], target)


class DynamicsCallback(TrainerCallback):
    """Every row is scored at C steps of a Trainer's run, which is so the reference; the result is a dynamics file.

    All ranks score together. If weights are sharded (FSDP, DeepSpeed ZeRO-3) it raises ValueError: keep checkpoints
    with whole weights, and read them with the reference FromCheckpoints. A model that the loss cannot follow is a
    ConfigError.
    """

    def __init__(self, dataset: Dataset, path: PathLike, *, checkpoints: int | list[float] = 5) -> None:
        """
        dataset: the Trainer's `train_dataset`, tokenised; its column `id` joins the scores with rows elsewhere.
            ValueError if a row has padding on the left, or several documents (`APART`).
        path: the dynamics file, which holds more after each scoring; a Trainer that resumes goes on with it, and one
            that begins removes it.
        checkpoints: as of TrainedReference, but not `online`: a Trainer keeps no losses of its own steps' rows.
        """
        scorings = not isinstance(checkpoints, str) and are_scorings(checkpoints)
        require(scorings, "checkpoints", checkpoints, SCORINGS)
        self._rows, self._path, self._checkpoints = TrainerRows(dataset), Path(path), checkpoints

    def on_train_begin(self, args, state, control, *, model, **kwargs):  # type: ignore[override]
        if getattr(args, "packing", False) or getattr(args, "sample_packing", False):  # TRL's, axolotl's
            raise ValueError("DynamicsCallback scores whole rows, not bins of them: set packing to false")
        # FSDP2 has DTensors, ZeRO-3 leaves empty weights.
        if any(hasattr(weight, "full_tensor") or not weight.numel() for weight in model.parameters()):
            raise ValueError(
                "DynamicsCallback cannot score sharded weights: leave it out, keep checkpoints with whole weights "
                "(accelerate: fsdp_state_dict_type FULL_STATE_DICT) and read them with the reference FromCheckpoints"
            )
        # A copy shares the weights. The forward of the model itself is in autocast by now, and its head is not.
        bare = extract_model_from_parallel(copy.copy(model), keep_fp32_wrapper=False)
        check_adapter(bare)
        check_head(bare)
        self._module = TrainingModule(bare)
        self._world = World(args.process_index, args.world_size, args.local_process_index, args.device)
        self._parts = self._world.from_main(lambda: self._scored_until(state.global_step))
        self.on_step_end(args, state, control)

    def _scored_until(self, step: int) -> list[TrainingDynamics]:
        """Return what a run that goes on at this step has scored; the file of another run is removed."""
        if not step:  # the run begins
            self._path.unlink(missing_ok=True)
        if not self._path.exists():
            return []
        found, ids = read_dynamics(self._path), self._rows.ids
        if missing := {*ids} - {*found.ids}:
            raise DataError(
                f"{self._path} has no scores of {len(missing)} of the {len(ids)} rows (such as {min(missing)}): resume "
                "with the rows that the run began with, or give DynamicsCallback another path"
            )
        c = int((found.steps <= step).sum())  # a run killed at step 7 goes on from 6: what 7 scored is made again
        part = replace(found, steps=found.steps[:c], nll_sum=found.nll_sum[:, :c], n_correct=found.n_correct[:, :c])
        return [part.of(ids)] if c else []

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[override]
        step, steps = state.global_step, checkpoint_steps(self._checkpoints, state.max_steps)
        # A resumed run may begin at a step that its file has.
        if step in steps and all(step > part.steps[-1] for part in self._parts):
            scorer = Scorer(world=self._world, precision="bf16" if args.bf16 else "fp32")
            self._parts += [one_checkpoint(self._rows.ids, step, scorer(self._module, self._rows))]
            self._world.on_main(lambda: write_dynamics(self._path, merge_dynamics(self._parts)))
