"""The configuration that the estimate's tests start from."""

from __future__ import annotations

from sftmix.config import RunConfig
from sftmix.options import DataOptions, ModelOptions, TrainingOptions

TRAINING = TrainingOptions(global_batch_size=8, micro_batch_size=4, precision="fp32")


def config(tiny, **changes) -> RunConfig:
    """Of the tiny model and its rows; `data` is a dict of changes to those options, the rest replaces what it names."""
    data = {"train": [str(tiny.train)], "eval": [str(tiny.eval)]} | changes.pop("data", {})
    changes = {"training": TRAINING, "model": ModelOptions(path=str(tiny.model))} | changes
    return RunConfig(data=DataOptions(**data), **changes)
