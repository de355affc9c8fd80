"""Base classes and shipped components, for users to swap; each is imported on first use.

Three are named `FromFile`: dynamics, scores or a split from a file. `--reference FromFile`, `--confidence FromFile` and
`--splitter FromFile` each find theirs; in Python they are in the modules `reference`, `confidence` and `splitters`.
"""

import importlib
from typing import Any

_NAMES = {
    # What a user subclasses.
    "component": ("Component", "Need"),
    "base": (
        "Callback",
        "CallbackResult",
        "ConfidenceEstimator",
        "Objective",
        "Optimizer",
        "PairSampler",
        "Perturbation",
        "Reference",
        "ReferenceContext",
        "Renderer",
        "RowFormat",
        "Schedule",
        "Selector",
        "Splitter",
        "StageState",
    ),
    "view": ("LossView",),
    # What the paper is made of, with the variants of each part.
    "reference": ("FromCheckpoints", "Online", "TrainedReference"),
    "confidence": ("LogPerplexity", "Perplexity", "variability"),
    "splitters": ("LengthMatched", "Median", "QualityLabel", "Quantile", "RandomSplit"),
    "pairing": ("AnyPairs", "RandomPairs", "SameGroupPairs"),
    "objectives": ("NTP", "DecomposedMixup", "MixupOnly", "SFTMix"),
    "optimizers": ("AdamW",),
    "callbacks": ("EarlyStopping", "Evaluate"),
    "selection": ("All",),
    # What comes from elsewhere: other methods, choices and places of mixing, weights of tokens, servers, 8-bit state.
    "others.confidences": ("IFD", "Correctness", "LearningPercentage", "LowVariability"),
    "others.endpoint": ("FromEndpoint", "FromSGLang"),
    "others.mixing": ("MeasureMixing",),
    "others.optimizers8bit": ("AdamW8bit",),
    "others.pairings": ("ConfidenceGapPairs", "LengthMatchedPairs", "LevelPairs"),
    "others.perturbations": ("NEFTune",),
    "others.places": ("CutMix", "EmbeddingMixup", "ManifoldMixup", "MixtureDivergence"),
    "others.reweighting": ("DFT", "IRDRO", "LabelSmoothing"),
    "others.schedules": ("AfterFraction", "Constant", "Cosine", "Linear"),
    "others.selectors": ("Longest", "Random", "ScoreAtLeast", "WithLabel"),
    "others.tokens": ("ASFT", "EAFT", "PriFT", "ProFit", "Rho1"),
    "listing": ("Shipped", "catalogue"),
}
__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
