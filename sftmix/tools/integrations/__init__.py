"""SFTMix inside trainers of others: transformers' Trainer, TRL's SFTTrainer and axolotl's.

SFTMixTrainer has pairs in each micro-batch, both counts over the global batch, and the loss in the forward;
DynamicsCallback takes training dynamics out of any Trainer's run. The methods without types are transformers' own.
"""

import functools
import itertools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from sftmix.components.component import require
from sftmix.components.confidence import Perplexity, variability
from sftmix.components.objectives import drawn
from sftmix.components.splitters import Median
from sftmix.disk.tables import PathLike, read_dynamics, read_split, read_table
from sftmix.functional import IGNORED, SFTMixLoss, aligned_pairs
from sftmix.model.head import check_head
from sftmix.model.load import check_ids
from sftmix.ranks.rng import generator
from sftmix.tools.integrations.dynamics import DynamicsCallback, check_adapter, row_ids
from sftmix.types import UNPAIRED, Int64, Scores

__all__ = ["DynamicsCallback", "SFTMixArguments", "SFTMixTrainer"]

ROW = "sftmix_row"
"""Column of the training set, and key of a batch: the number of each row."""

UNFIT = (
    "packing",  # TRL's, as padding_free
    "padding_free",
    "sample_packing",  # axolotl's
    "compute_loss_func",
    "use_liger_kernel",
    "label_smoothing_factor",
    "deepspeed",
    "parallelism_config",
    "loss_type",  # TRL's: nll, dft
    "train_sampling_strategy",  # random, or another order; group_by_length before transformers 5
    "group_by_length",
    "curriculum_sampling",  # axolotl's, as orpo_alpha
    "orpo_alpha",
    "auto_find_batch_size",
    "model_init",
)
"""Options of trainers that SFTMix does not work with."""


@dataclass
class SFTMixArguments:
    """Options of SFTMix, to be inherited beside TrainingArguments or SFTConfig.

    sftmix_split       a split.parquet, also from a run of sftmix; or a dynamics.parquet, which is split at the median
                       of the training rows
    sftmix_mu          weight of Mixup
    sftmix_alpha       lambda ~ Beta(alpha, alpha)
    sftmix_mixup_mean  own or ntp, as of SFTMixLoss
    """

    sftmix_split: str = ""
    sftmix_mu: float = 0.2
    sftmix_alpha: float = 0.5
    sftmix_mixup_mean: str = "own"


def groups_of(path: PathLike, ids: list[str]) -> Int64:
    """Return i64[N]: 0 for confident rows, 1 for unconfident ones, UNPAIRED for others.

    With dynamics, these rows are split as a run of sftmix splits them (`Median`). The file may hold other rows as well;
    ValueError if it lacks one of these.
    """
    table = read_table(path, ["id"])
    if missing := sorted({*ids}.difference(map(str, table["id"].to_pylist()))):
        raise ValueError(
            f"sftmix_split: {path} lacks {len(missing):,} of the {len(ids):,} training rows (first: {missing[0]}), "
            "which would get no Mixup. Make the file from these rows, tokenised in the same way and cut at the same "
            "length (without a column id, an id is a hash of the tokens), or take them out of train_dataset"
        )
    if "group" in table.column_names:
        names, split = read_split(path)
        group = dict(zip(names, split.group, strict=True))
        code = np.array([group[name] for name in ids])  # the file has its own order, and may have more rows
    else:
        dynamics, rows = read_dynamics(path).of(ids), np.arange(len(ids))
        confidence = Perplexity().estimate(dynamics)
        scores = Scores(ids, rows, confidence, variability(dynamics), dynamics.n_tokens)
        split = Median().split(scores, seed=0)
        code = split.group
    # Groups 0, 1, 2, 3 and -1 -> 0, -1, -1, 1 and -1.
    return np.select([code == 0, code == len(split.names) - 1], [0, 1], UNPAIRED)


class PairSampler(list[int]):
    """Row numbers of an epoch, two by two: a confident and an unconfident row, or two of those without a partner.

    No micro-batch of an even size cuts a pair, so pairs do not depend on its size.
    """

    def __init__(self, groups: Int64, seed: int) -> None:
        self._groups, self._seed = groups, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        rng = generator(self._seed, "pairs", epoch)
        one, other, rest = (rng.permutation(np.flatnonzero(self._groups == group)) for group in (0, 1, UNPAIRED))
        n = min(len(one), len(other))
        alone = rng.permutation(np.concatenate([one[n:], other[n:], rest]))
        even = len(alone) // 2 * 2  # [6] alone ends the epoch: the pairs before it are not moved by one
        units = np.concatenate([np.stack([one[:n], other[:n]], axis=1), alone[:even].reshape(-1, 2)])
        # Groups 0 1 0 1 0 -1 -> rows 0 3, 4 1, 2 5.
        self[:] = [*rng.permutation(units).ravel().tolist(), *alone[even:].tolist()]


class _PairsOfEpoch(TrainerCallback):
    """Sets the epoch while the sampler is in reach: behind the batches that a resumed Trainer skips it is not."""

    def on_epoch_begin(self, args, state, control, *, train_dataloader, **kwargs):  # type: ignore[override]
        train_dataloader.set_epoch(int(state.epoch or 0))  # resumed at 1.33: epoch 1


class SFTMixTrainer(Trainer):
    """A Trainer that minimises NTP + mu Mixup; with TRL, `class Mine(SFTMixTrainer, SFTTrainer)`.

    Its args inherit SFTMixArguments; evaluation is the trainer's. Raises ValueError for what does not fit, and where
    training begins without a confident and an unconfident row; ConfigError for a model that the loss cannot follow, or
    whose embeddings are fewer than the tokens of its rows.

    outputs  of the last micro-batch: the fields of SFTLoss
    """

    args: Any
    train_dataset: Any
    _signature_columns: Any

    def __init__(self, model, args, *more, **kwargs):
        _check_arguments(args, kwargs)
        super().__init__(model, args, *more, **kwargs)
        if any(config.peft_type == "ADALORA" for config in getattr(self.model, "peft_config", {}).values()):
            raise ValueError("AdaLoRA adds a term to the loss that SFTMix's does not have; use LoRA")
        self.add_callback(_PairsOfEpoch)
        self._ids = row_ids(self.train_dataset)
        if ROW in self.train_dataset.column_names:  # it is another trainer's
            self.train_dataset = self.train_dataset.remove_columns(ROW)
        self._groups = groups_of(args.sftmix_split, self._ids)
        self.train_dataset = self.train_dataset.add_column(ROW, [*range(len(self._ids))])
        self.data_collator = functools.partial(_collate, self.data_collator)
        self._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, ROW]  # else the Trainer drops the column
        base: Any = getattr(self.model, "get_base_model", lambda: self.model)()  # without PEFT's wrapper
        # A row may be empty, and all may be.
        check_ids(base.config, self.processing_class, [0, *map(max, filter(len, self.train_dataset["input_ids"]))])
        check_adapter(base)
        head = check_head(base, trains=True)
        loss = SFTMixLoss(args.sftmix_mu, args.sftmix_mixup_mean, softcap=head.softcap, scale=head.scale)
        plain = getattr(base.forward, "__func__", None) or base.forward.func  # a partial of accelerate's (device_map)

        # The loss is computed inside the forward that DDP or FSDP wraps, whose hooks so fire. It takes the model as a
        # method does: a copy of the model (an average of weights) computes with its own.
        @functools.wraps(plain)  # generate checks its keywords by this signature
        def sftmix_forward(model, *inputs, sftmix=None, labels=None, **kwargs):
            if sftmix is None:
                return plain(model, *inputs, labels=labels, **kwargs)
            # Gemma 3's body puts images into the states, its decoder leaves them out; a Llama 4 of text is the body.
            body = model.get_decoder() if model.base_model is model else model.base_model
            hidden = body(*inputs, **kwargs, use_cache=False).last_hidden_state
            own = replace(head, module=model.get_output_embeddings())
            return loss(hidden, own.weight, labels, *sftmix, bias=own.bias)._asdict()

        base.forward = types.MethodType(sftmix_forward, base)

    def _get_train_sampler(self, train_dataset=None):
        _, one, other = np.bincount(self._groups - UNPAIRED, minlength=3)  # -1, 0, 1 -> 0, 1, 2
        if not one * other:
            raise ValueError(
                f"sftmix_split: {self.args.sftmix_split} makes {one:,} training rows confident and {other:,} "
                "unconfident, and a pair is one of each: name a split.parquet that has both among these rows, or "
                "dynamics whose perplexity differs between them"
            )
        seed = self.args.data_seed
        return PairSampler(self._groups, self.args.seed if seed is None else seed)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, with pairs and lambdas, and [2], tokens and token pairs of all ranks."""
        batch_samples = [*itertools.islice(epoch_iterator, num_batches)]
        counts, args, step = torch.zeros(2, device=device), self.args, self.state.global_step

        for batch in batch_samples:
            if missing := {key for key in (ROW, "labels") if batch.get(key) is None}:  # a collator may leave None
                raise ValueError(
                    f"a batch has no {missing}: give the rows labels, or a collator that makes them, and leave out "
                    "with_transform, or return the column, too"
                )
            rows = batch[ROW].cpu().numpy()
            # [4, 9, 2, 7, 5] -> [[4, 9], [2, 7]]: the last row has no partner.
            units = rows[: len(rows) // 2 * 2].reshape(-1, 2)
            mixed = np.flatnonzero((self._groups[units] == (0, 1)).all(axis=1))
            ids = [[self._ids[row] for row in pair] for pair in units[mixed]]
            lam = [drawn(args.sftmix_alpha, 1, pair, step=step, seed=args.seed).item() for pair in ids]
            # Places in the batch: units 0 and 2 are [[0, 1], [4, 5]].
            pairs = torch.tensor(2 * mixed[:, None] + [0, 1], device=device)
            batch["sftmix"] = pairs, torch.tensor(lam, device=device)
            counts[0] += (batch["labels"][:, 1:] != IGNORED).sum()  # nothing predicts the first token
            counts[1] += len(aligned_pairs(batch["labels"], pairs)[0])
        return batch_samples, self.accelerator.reduce(counts, "sum")

    def training_step(self, *inputs, **kwargs):
        # Both counts have divided the loss. A Trainer divides it by the micro-batches of a step as well if the model's
        # own loss is a mean without a count (Gemma 3 and Qwen 3.5 with images); in an evaluation it is that loss.
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True
        loss = super().training_step(*inputs, **kwargs)
        self.model_accepts_loss_kwargs = accepts
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop(ROW, None)
        if "sftmix" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["sftmix"] += tuple(num_items_in_batch)  # pairs, lam, NTP tokens, token pairs
        self.outputs = model(**inputs)
        if "mixup" not in self.outputs:
            raise ValueError("SFTMix is in the forward of the trainer's model, and another ran; do not replace either")
        return self.outputs["loss"] * self.accelerator.num_processes  # DDP and FSDP average gradients over ranks


def _check_arguments(args: Any, more: dict[str, Any]) -> None:
    """Raise ValueError for options of a trainer, or keywords of its own, that SFTMix does not work with."""
    if not hasattr(args, "sftmix_split"):
        raise ValueError("args has no options of SFTMix; give it a class that inherits SFTMixArguments, too")
    values = {**vars(args), **more}  # compute_loss_func and model_init are arguments of the trainer itself
    # "nll" and "random" are the defaults of TRL and transformers.
    named = [name for name in UNFIT if values.get(name) not in (None, False, 0, "nll", "random")]
    named += ["split_batches"] * args.accelerator_config.split_batches
    if named:
        raise ValueError(f"SFTMix mixes whole rows in its own order, with its own loss; leave out {named}")
    if (size := args.per_device_train_batch_size) % 2:
        raise ValueError(f"SFTMix mixes pairs, and per_device_train_batch_size is {size}; use an even number")
    if args.n_gpu > 1:
        raise ValueError(
            f"SFTMix takes one GPU a process, and this one sees {args.n_gpu}: accelerate launch, or "
            "CUDA_VISIBLE_DEVICES=0"
        )
    require(args.sftmix_alpha > 0, "sftmix_alpha", args.sftmix_alpha, "above 0")
    if not os.path.isfile(split := args.sftmix_split):
        raise ValueError(f"sftmix_split is {split!r}, which is no file; name a split.parquet or dynamics.parquet")


def _collate(collator: Callable[[list[Any]], dict[str, Any]], features: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the collator's batch with the number of each row, which held-out rows do not have."""
    rows = [int(feature.pop(ROW)) for feature in features if ROW in feature]
    tokens = [torch.as_tensor(feature.get("input_ids", [])) for feature in features]  # a collator may change features
    batch = collator(features)
    if rows and batch.get("labels") is not None:  # else get_batch_samples says it
        _check_lines(batch, tokens)
    return {**batch, **({ROW: torch.tensor(rows)} if rows else {})}


def _check_lines(batch: Any, rows: list[Tensor]) -> None:
    """Raise ValueError if the lines of a batch are not those of the rows, one by one, in their order.

    A collator may pad, cut and mask rows, or add to them: a line is said to be another row's only if it begins or ends
    as that row does, and not as its own.
    """
    made = len(batch["labels"])
    if made != len(rows) or any(
        not _alike(line, rows[k]) and any(_alike(line, row) for row in rows)
        for k, line in enumerate(batch.get("input_ids", []))
    ):
        raise ValueError(
            f"the collator made {made} lines of {len(rows)} rows, or another order of them, and SFTMix mixes rows by "
            "their places: give a collator that makes one line of each row, in the order of the rows"
        )


def _alike(line: Tensor, row: Tensor) -> bool:
    """Return True if both begin or end alike, as far as the shorter one goes, and neither is empty."""
    n = min(len(line), len(row))
    return n > 0 and bool((line[:n] == row[:n]).all() or (line[-n:] == row[-n:]).all())
