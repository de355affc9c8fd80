"""Base classes and shipped components, for users to swap; each is imported on first use.

Three are named `FromFile`: dynamics, scores or a split from a file. `--reference FromFile`, `--confidence FromFile` and
`--splitter FromFile` each find theirs; in Python they are in the modules `reference`, `confidence` and `splitters`.
"""

import importlib
from typing import Any

_NAMES = {
    "base": (
        "Callback",
        "CallbackResult",
        "Component",
        "Need",
        "ConfidenceEstimator",
        "Objective",
        "Optimizer",
        "PairSampler",
        "Perturbation",
        "Reference",
        "ReferenceContext",
        "Schedule",
        "Selector",
        "Splitter",
        "StageState",
    ),
    "callbacks": ("EarlyStopping", "Evaluate", "LossSpikeGuard"),
    "mixing": ("MeasureMixing",),
    "endpoint": ("FromEndpoint", "FromSGLang"),
    "confidence": (
        "IFD",
        "Correctness",
        "LearningPercentage",
        "LogPerplexity",
        "LowVariability",
        "Perplexity",
        "variability",
    ),
    "listing": ("Shipped", "catalogue"),
    "objectives": ("NTP", "DecomposedMixup", "MixupOnly", "SFTMix"),
    "places": ("CutMix", "EmbeddingMixup", "ManifoldMixup", "MixtureDivergence"),
    "view": ("LossView",),
    "pairing": (
        "AnyPairs",
        "ByConfidence",
        "ConfidenceGapPairs",
        "LengthMatchedPairs",
        "LevelPairs",
        "RandomPairs",
        "SameGroupPairs",
    ),
    "optimizers": ("AdamW", "AdamW8bit"),
    "perturbations": ("NEFTune",),
    "reference": ("FromCheckpoints", "Online", "TrainedReference"),
    "reweighting": ("DFT", "IRDRO", "LabelSmoothing"),
    "schedules": ("AfterFraction", "Constant", "Cosine", "Linear"),
    "selection": ("All", "Longest", "Random", "S2L", "ScoreAtLeast", "Shares", "WithLabel"),
    "splitters": ("LengthMatched", "Median", "QualityLabel", "Quantile", "RandomSplit"),
    "tokens": ("ASFT", "EAFT", "PriFT", "ProFit", "Rho1", "TailSFT"),
}
__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
