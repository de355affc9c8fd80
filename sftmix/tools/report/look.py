"""Forward passes over some examples: the hidden state of the last response token, and the NLL of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from sftmix.batches.rows import RowSubset
from sftmix.common.world import World, start_world
from sftmix.functional import sft_loss
from sftmix.model.adapters import read_adapters
from sftmix.model.head import Head
from sftmix.options import TrainingOptions
from sftmix.pipeline.models import load_for_run, scorer
from sftmix.pipeline.rows import any_packed
from sftmix.tools.report.run import RunView
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import resolve_precision, training_module
from sftmix.training.scoring import Column, split_by_row
from sftmix.types import Batch, Float64, Rows


@dataclass(frozen=True)
class Look:
    """What a model shows of K examples.

    rows       i64[K], rows of the training set
    last       f32[K, D], hidden state at the last response token before the end of the turn: the input of the LM head
               that predicts the end
    token_nll  K arrays f32[n_tokens], -log p of each response token, nats
    """

    rows: Rows
    last: np.ndarray
    token_nll: Sequence[np.ndarray]

    @property
    def nll(self) -> Float64:
        """f64[K], mean NLL per response token."""
        return np.array([tokens.mean(dtype=np.float64) for tokens in self.token_nll])


def look(view: RunView, model: str | Path, rows: Rows, *, name: str) -> Look:
    """Pass some training examples through a model of the run, the base model or an exported one, in this process alone.

    name  for the progress bar
    """
    options, data = replace(view.config.training, parallel="ddp"), view.rows.data.train  # of one rank: as it is
    with start_world() as world:
        module = training_module(
            _loaded(view, Path(model), world, options),
            options,
            precision=resolve_precision(options.precision, world.device),
            world=world,
            packed=any_packed(data),
        )
        scores = scorer(options, world, view.rows.encoder, name=f"report: {name}")
        last, token_nll = scores.columns(module, RowSubset(data, rows), _read)
    return Look(rows, np.asarray(last), token_nll)


def _loaded(view: RunView, model: Path, world: World, options: TrainingOptions) -> PreTrainedModel:
    """Load a model as a run does; an export that holds adapters alone is loaded onto the run's base model."""
    config, lora = view.config, view.config.model.lora
    adapted = (model / "adapter_config.json").exists()
    path, lora = (config.model.path, lora) if adapted else (str(model), lora.without_adapters())
    loaded, _ = load_for_run(config, world, path, view.rows.encoder, options, lora)
    if adapted:
        read_adapters(loaded, model)
    return loaded


def _read(module: TrainingModule, batch: Batch) -> list[Column]:
    hidden, nll = module.read(batch, _nll)
    ends = torch.cumsum(torch.bincount(batch.slot, minlength=len(batch.rows)), dim=0) - 1
    return [hidden[ends].float().cpu().numpy(), split_by_row(nll.float(), batch)]


def _nll(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden [T, D] and the NLL [T] of the labels."""
    nothing, pairs = hidden.new_zeros(0), labels.new_zeros(0, 2)
    out = sft_loss(
        hidden,
        head.weight,
        labels,
        pairs,
        nothing,
        row_weight=hidden.new_zeros(len(labels)),
        pair_weight=nothing,
        bias=head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )
    return hidden, out.nll
