"""What a model shows of some examples: their NLL, and the hidden state of the last response token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sftmix.batches.rows import RowSubset
from sftmix.common.world import start_world
from sftmix.pipeline.loaded import scoring_model
from sftmix.tools.report.run import RunView
from sftmix.training.module import TrainingModule
from sftmix.training.scoring import Column
from sftmix.types import Batch, Float64, Rows


def look(view: RunView, model: Path, rows: Rows, *, name: str, hidden: bool = False) -> np.ndarray | Float64:
    """Pass K training examples through a model of the run, the base model or an exported one, in this process alone.

    name  for the progress bar
    Returns f64[K], their mean NLL per response token in nats; with `hidden` f32[K, D], the input of the LM head at
    the last response token before the end of the turn.
    """
    every = view.rows.data.train
    # Of one rank: the model as it is.
    config = replace(view.config, training=replace(view.config.training, parallel="ddp"))
    path, lora, adapters = str(model), config.model.lora.without_adapters(), None
    if (model / "adapter_config.json").exists():
        path, lora, adapters = config.model.path, config.model.lora, model
    with start_world() as world:
        score, module = scoring_model(
            config,
            world,
            path,
            view.rows.encoder,
            name=f"report: {name}",
            packed=every.packed,
            lora=lora,
            adapters=adapters,
        )
        data = RowSubset(every, rows)
        if hidden:
            return np.asarray(score.columns(module, data, _last)[0])
        scores = score(module, data)
    return scores.nll_sum / scores.n_tokens


def _last(module: TrainingModule, batch: Batch) -> list[Column]:
    """Return the hidden state at the last response token of each row."""
    hidden = module.read(lambda it: it.hidden_states(batch))
    ends = torch.cumsum(torch.bincount(batch.slot, minlength=len(batch.rows)), dim=0) - 1
    return [hidden[ends].float().cpu().numpy()]
