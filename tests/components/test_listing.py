"""The catalogue and the public names agree with the classes."""

from __future__ import annotations

import importlib
import inspect
import pickle

import sftmix.components as components
from sftmix.components.base import Component


def test_the_catalogue_lists_each_base_with_default_and_alternative():
    found = {base: [shipped.name for shipped in shipped_ones] for base, shipped_ones in components.catalogue()}
    assert found == {
        "Reference": ["TrainedReference", "FromCheckpoints", "Online", "FromFile"],
        "ConfidenceEstimator": ["Perplexity", "LogPerplexity"],
        "Splitter": ["Median", "RandomSplit"],
        "PairSampler": ["RandomPairs", "LengthMatchedPairs"],
        "Objective": ["NTP", "SFTMix"],
        "Callback": ["Evaluate"],
        "Selector": ["All"],
        "Schedule": [],
        "Perturbation": [],
    }


def test_entries_are_true():
    for base, shipped_ones in components.catalogue():
        for shipped in shipped_ones:
            module, _, name = shipped.path.rpartition(".")
            cls = getattr(importlib.import_module(module), name)
            assert issubclass(cls, getattr(components, base))
            assert name == shipped.name
            assert shipped.doc == inspect.getdoc(cls).splitlines()[0]


def test_shipped_components_are_rebuilt_from_their_spec_and_pickled():
    for _, shipped_ones in components.catalogue():
        for shipped in shipped_ones:
            module, _, name = shipped.path.rpartition(".")
            required = {k: "x" for k, v in shipped.defaults.items() if v is inspect.Parameter.empty}
            made: Component = getattr(importlib.import_module(module), name)(**required)
            spec = made.spec()
            assert spec["class_path"] == shipped.path
            assert spec["init_args"] == shipped.defaults | required
            assert pickle.loads(pickle.dumps(made)).spec() == spec


def test_public_names_resolve():
    for name in components.__all__:
        assert getattr(components, name).__name__ == name
    assert set(components.__all__) <= set(dir(components))
