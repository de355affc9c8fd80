"""The options of each part as plain dataclasses; the command line shows them under `--model.*`, `--data.*`, ...

`sftmix.config.RunConfig` composes them with the components. A field's docstring is its help text.
"""

from sftmix.options.data import LENGTHS, DataOptions, SpecialTokens, Thoughts
from sftmix.options.model import LoraOptions, ModelOptions
from sftmix.options.ranges import Check, at_least_1, out_of_range
from sftmix.options.reference import ReferenceModel, ReferenceTraining, inherit, reference_lora
from sftmix.options.training import (
    LAYOUT,
    OF_SHARDS,
    SHARDED,
    CheckpointOptions,
    TrainingOptions,
)

__all__ = [
    "LAYOUT",
    "LENGTHS",
    "OF_SHARDS",
    "SHARDED",
    "Check",
    "CheckpointOptions",
    "DataOptions",
    "LoraOptions",
    "ModelOptions",
    "ReferenceModel",
    "ReferenceTraining",
    "SpecialTokens",
    "Thoughts",
    "TrainingOptions",
    "at_least_1",
    "inherit",
    "out_of_range",
    "reference_lora",
]
