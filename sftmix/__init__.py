"""SFTMix: instruction tuning with confidence-guided Mixup (arXiv 2410.05248).

Importing this package imports no torch: the public names below are resolved on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "sft_loss": "sftmix.functional",
    "reference_sft_loss": "sftmix.functional",
    "SFTLoss": "sftmix.functional",
    "Batch": "sftmix.types",
    "Example": "sftmix.types",
    "Plan": "sftmix.types",
    "Scores": "sftmix.types",
    "Split": "sftmix.types",
    "TrainingDynamics": "sftmix.types",
    "RunConfig": "sftmix.config",
    "run": "sftmix.pipeline.recipe",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sftmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
