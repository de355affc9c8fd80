"""Base classes and shipped components, for users to swap; each is imported on first use.

Three are named `FromFile`: dynamics, scores or a split from a file. `--reference FromFile`, `--confidence FromFile` and
`--splitter FromFile` each find theirs; in Python they are in the modules `reference`, `confidence` and `splitters`.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Callback": "base",
    "CallbackResult": "base",
    "Component": "base",
    "Need": "base",
    "ConfidenceEstimator": "base",
    "Objective": "base",
    "Optimizer": "base",
    "PairSampler": "base",
    "Perturbation": "base",
    "Reference": "base",
    "ReferenceContext": "base",
    "Schedule": "base",
    "Selector": "base",
    "Splitter": "base",
    "StageState": "base",
    "EarlyStopping": "callbacks",
    "Evaluate": "callbacks",
    "LossSpikeGuard": "callbacks",
    "MeasureMixing": "mixing",
    "FromEndpoint": "endpoint",
    "FromSGLang": "endpoint",
    "IFD": "confidence",
    "Correctness": "confidence",
    "LearningPercentage": "confidence",
    "LogPerplexity": "confidence",
    "LowVariability": "confidence",
    "Perplexity": "confidence",
    "variability": "confidence",
    "Shipped": "listing",
    "catalogue": "listing",
    "NTP": "objectives",
    "DecomposedMixup": "objectives",
    "MixupOnly": "objectives",
    "CutMix": "places",
    "EmbeddingMixup": "places",
    "ManifoldMixup": "places",
    "MixtureDivergence": "places",
    "LossView": "view",
    "SFTMix": "objectives",
    "AnyPairs": "pairing",
    "ByConfidence": "pairing",
    "ConfidenceGapPairs": "pairing",
    "LengthMatchedPairs": "pairing",
    "LevelPairs": "pairing",
    "RandomPairs": "pairing",
    "SameGroupPairs": "pairing",
    "AdamW": "optimizers",
    "AdamW8bit": "optimizers",
    "NEFTune": "perturbations",
    "FromCheckpoints": "reference",
    "Online": "reference",
    "TrainedReference": "reference",
    "DFT": "reweighting",
    "IRDRO": "reweighting",
    "LabelSmoothing": "reweighting",
    "AfterFraction": "schedules",
    "Constant": "schedules",
    "Cosine": "schedules",
    "Linear": "schedules",
    "All": "selection",
    "Longest": "selection",
    "Random": "selection",
    "S2L": "selection",
    "ScoreAtLeast": "selection",
    "Shares": "selection",
    "WithLabel": "selection",
    "LengthMatched": "splitters",
    "Median": "splitters",
    "QualityLabel": "splitters",
    "Quantile": "splitters",
    "RandomSplit": "splitters",
    "ASFT": "tokens",
    "EAFT": "tokens",
    "PriFT": "tokens",
    "ProFit": "tokens",
    "Rho1": "tokens",
    "TailSFT": "tokens",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
