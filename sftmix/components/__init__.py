"""What users swap: base classes and shipped components, each resolved on first use, so that importing costs nothing.

The two `FromFile` (a reference from a dynamics file, and later a split from a file) are reached through their modules:
`sftmix.components.reference.FromFile`.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Callback": "base",
    "CallbackResult": "base",
    "Component": "base",
    "ConfidenceEstimator": "base",
    "Objective": "base",
    "PairSampler": "base",
    "Perturbation": "base",
    "Reference": "base",
    "ReferenceContext": "base",
    "Schedule": "base",
    "Selector": "base",
    "Splitter": "base",
    "StageState": "base",
    "Evaluate": "callbacks",
    "LogPerplexity": "confidence",
    "Perplexity": "confidence",
    "variability": "confidence",
    "Shipped": "listing",
    "catalogue": "listing",
    "NTP": "objectives",
    "SFTMix": "objectives",
    "LengthMatchedPairs": "pairing",
    "RandomPairs": "pairing",
    "All": "selection",
    "TrainedReference": "reference",
    "Median": "splitters",
    "RandomSplit": "splitters",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
