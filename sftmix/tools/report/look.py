"""What a model shows of some examples: their NLL, and the hidden state of the last response token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sftmix.batches.rows import RowSubset
from sftmix.common.world import start_world
from sftmix.model.adapters import read_adapters
from sftmix.pipeline.models import load_for_run, scorer
from sftmix.pipeline.rows import any_packed
from sftmix.tools.report.run import RunView
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import resolve_precision, training_module
from sftmix.training.scoring import Column
from sftmix.types import Batch, Float64, Rows


def look(view: RunView, model: Path, rows: Rows, *, name: str, hidden: bool = False) -> np.ndarray | Float64:
    """Pass K training examples through a model of the run, the base model or an exported one, in this process alone.

    name  for the progress bar
    Returns f64[K], their mean NLL per response token in nats; with `hidden` f32[K, D], the input of the LM head at
    the last response token before the end of the turn.
    """
    config, encoder = view.config, view.rows.encoder
    options = replace(config.training, parallel="ddp")  # of one rank: the model as it is
    data = RowSubset(view.rows.data.train, rows)
    path, lora, has_adapters = str(model), config.model.lora, (model / "adapter_config.json").exists()
    if has_adapters:
        path = config.model.path
    else:
        lora = lora.without_adapters()
    with start_world() as world:
        loaded, _ = load_for_run(config, world, path, encoder, options, lora)
        if has_adapters:
            read_adapters(loaded, model)
        precision, packed = resolve_precision(options.precision, world.device), any_packed(view.rows.data.train)
        module = training_module(loaded, options, precision=precision, world=world, packed=packed)
        score = scorer(options, world, encoder, name=f"report: {name}")
        if hidden:
            return np.asarray(score.columns(module, data, _last)[0])
        scores = score(module, data)
    return scores.nll_sum / scores.n_tokens


def _last(module: TrainingModule, batch: Batch) -> list[Column]:
    """Return the hidden state at the last response token of each row."""
    hidden = module.read(batch, lambda hidden, head, labels: hidden)
    ends = torch.cumsum(torch.bincount(batch.slot, minlength=len(batch.rows)), dim=0) - 1
    return [hidden[ends].float().cpu().numpy()]
