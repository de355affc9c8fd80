"""The options of each part as plain dataclasses; the command line shows them under `--model.*`, `--data.*`, ...

`sftmix.config.RunConfig` composes them with the components. A field's docstring is its help text. Each class is
imported from its file on first use. Modules of sftmix import the files, and so no options that they do not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftmix.options.data import DataOptions
    from sftmix.options.model import LoraOptions, ModelOptions
    from sftmix.options.reference import ReferenceModel, ReferenceTraining
    from sftmix.options.training import CheckpointOptions, TrainingOptions

__all__ = [
    "CheckpointOptions",
    "DataOptions",
    "LoraOptions",
    "ModelOptions",
    "ReferenceModel",
    "ReferenceTraining",
    "TrainingOptions",
]

_FILES = {
    "CheckpointOptions": "training",
    "DataOptions": "data",
    "LoraOptions": "model",
    "ModelOptions": "model",
    "ReferenceModel": "reference",
    "ReferenceTraining": "reference",
    "TrainingOptions": "training",
}


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
