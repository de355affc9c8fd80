"""Rows and training stages that the benchmarks of training steps share."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from sftmix.components.objectives import NTP
from sftmix.components.pairing import RandomPairs
from sftmix.components.splitters import RandomSplit
from sftmix.data import EncodedDataset, load_data, make_encoder
from sftmix.data.batching import TokenisedRows
from sftmix.dynamics import score_rows
from sftmix.models import load_tokenizer
from sftmix.options import CheckpointOptions, DataOptions, TrainingOptions
from sftmix.training.distributed import World
from sftmix.training.order import TrainingOrder
from sftmix.training.stage import Stage
from sftmix.types import Rows, Scores, Split


def load_rows(model: str, rows: str, *, limit: int, max_length: int) -> EncodedDataset:
    """The first `limit` rows of a file under the model's own tokenizer and template."""
    encoder = make_encoder(load_tokenizer(model))
    options = DataOptions(train=[rows], limit=limit)
    return load_data(options, encoder, max_length=max_length, seed=0, progress=False).train


def ntp_stage(
    model: PreTrainedModel, data: TokenisedRows, options: TrainingOptions, world: World, directory: Path
) -> Stage:
    """NTP in the order that pairs from random halves give: SFTMix's is the same with another objective (and model).

    Which half an example is in changes nothing of what a step costs.
    """
    n = len(data)
    nothing = np.full(n, np.nan)
    scores = Scores([str(row) for row in range(n)], np.arange(n), nothing, nothing, np.asarray(data.lengths))
    split = RandomSplit().split(scores, seed=0)
    return Stage(
        name="ntp",
        model=model,
        data=data,
        order=TrainingOrder(n, partial(_pairs, split, scores), options=options, seed=0),
        objective=NTP(),
        options=options,
        checkpoint=CheckpointOptions(every=0),
        directory=directory,
        seed=0,
        split_of=lambda epoch: split,
        scorer=partial(score_rows, world=world, precision=options.precision),
    )


def _pairs(split: Split, scores: Scores, epoch: int) -> Rows:
    return RandomPairs().pairs(split, scores, epoch=epoch, seed=0)
