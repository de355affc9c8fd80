"""The catalogue agrees with the classes."""

import importlib
import inspect
import math
import pickle
import re

import pytest

import sftmix.components as components
from sftmix.components.component import Component
from sftmix.config.schema import options_of
from sftmix.words.errors import ConfigError
from tests.components import examples

REQUIRED = {
    "value": 0.5,
    "start": 0.1,
    "end": 0.9,
    "fraction": 0.25,
    "k": 3,
    "url": "http://h",
    "threshold": 4.5,
    "shares": {"a": 1.0},
}
"""Values of required options that are not text."""


def test_shipped_components_are_rebuilt_from_their_spec_and_pickled():
    for base, shipped_ones in components.catalogue():
        for shipped in shipped_ones:
            module, _, name = shipped.path.rpartition(".")
            cls = getattr(importlib.import_module(module), name)
            assert issubclass(cls, getattr(components, base))
            assert (name, shipped.doc) == (shipped.name, inspect.getdoc(cls).splitlines()[0])
            defaults = {k: p.default for k, p in options_of(cls).items()}
            required = {k: REQUIRED.get(k, k) for k, v in defaults.items() if v is inspect.Parameter.empty}
            made: Component = cls(**required)
            spec = made.spec()
            assert spec["class_path"] == shipped.path
            assert spec["init_args"] == defaults | required
            assert pickle.loads(pickle.dumps(made)).spec() == spec


def test_a_component_within_a_component_goes_along():
    made = components.SFTMix(mu=components.Linear(start=0, end=0.4))
    spec, path = made.spec(), "sftmix.components.others.schedules.Linear"
    assert spec["init_args"]["mu"] == {"class_path": path, "init_args": {"start": 0, "end": 0.4}}
    again = pickle.loads(pickle.dumps(made))
    assert again.spec() == spec != components.SFTMix(mu=components.Linear(start=0, end=0.5)).spec()
    assert again.mu.value(5, 11) == 0.2


WRONG = {
    "Evaluate": {"every": [0]},
    "LossSpikeGuard": {"factor": [1.0, math.nan], "window": [1]},
    "SFTMix": {
        "mu": [-0.1, math.nan],
        "alpha": [0.0, math.inf],
        "ntp_on": ["some"],
        "mixup_mean": ["mean"],
        "lambda_per": ["row"],
        "mean": ["pair"],
    },
    "IFD": {"checkpoint": ["best"]},
    "NEFTune": {"alpha": [0.0, -1.0, math.nan]},
    "LabelSmoothing": {"epsilon": [-0.1, 1.0, math.nan]},
    "UnigramSmoothing": {"epsilon": [-0.1, 1.0, math.nan]},
    "ConfidencePenalty": {"beta": [-0.1, math.inf, math.nan]},
    "PermutedPairs": {"global_batch_size": [1]},
    "IRDRO": {"tau": [0.0, -1.0, math.inf]},
    "AfterFraction": {"fraction": [1.5, math.nan]},
    "ConfidenceGapPairs": {"min_gap": [0.51, math.nan]},
    "LengthMatchedPairs": {"window": [0]},
    "LevelPairs": {"rule": ["next"]},
    "Quantile": {"levels": [1, 129]},
    "Shares": {"shares": [{}, {"a": 0.6, "b": 0.6}, {"a": 1.5, "b": -0.5}]},
    "TrainedReference": {"checkpoints": [0, -1, [], [-0.5], [1.5], [0.25, 40], [math.nan], [math.inf]]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_named_with_what_is_allowed(name):
    cls = getattr(examples if hasattr(examples, name) else components, name)
    required = {k: REQUIRED.get(k, k) for k, p in options_of(cls).items() if p.default is inspect.Parameter.empty}
    for option, values in WRONG[name].items():
        for value in values:
            told = rf"^({cls.option}\.(\w+\.)?)?{option}.* is {re.escape(repr(value))}; allowed: "
            with pytest.raises(ConfigError, match=told):
                cls(**{**required, option: value})
