"""What is said of names and values that do not fit, where a type has several forms or a component holds another."""

from __future__ import annotations

import copy
import importlib

import pytest

from sftmix.common.errors import ConfigError
from sftmix.components.base import Splitter
from sftmix.config import RunConfig
from sftmix.config.read import from_plain
from sftmix.config.values import ELSEWHERE, unknown_option


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["run", "--pairing.window", "8"],
            ["pairing is no PairSampler that has options", "--pairing CLASS: RandomPairs"],
        ),
        (
            ["run", "--pairing", "LengthMatchedPairs", "--pairing.window", "x"],
            ["pairing.window: 'x'", ": a whole number."],
        ),
        (["run", "--reference.model.lora", "3"], ["reference.model.lora: '3'", "a group of options {r, lora_alpha, "]),
        (["run", "--training.betas", "0.9"], ["training.betas: '0.9'", "a list of 2 values"]),
        (["run", "--callbacks+", "Evaluat"], ["callbacks: no Callback 'Evaluat'", "Did you mean Evaluate?"]),
        (["run", "--splitter", "{class_path: Medin}"], ["splitter: no Splitter 'Medin'", "Did you mean Median?"]),
        (["preview", "--rows", "x"], ["rows: 'x'", "a whole number"]),
        (
            ["preview", "--data.columns", "output=output_gpt4"],
            ["'output=output_gpt4' is a text; allowed: a map", "for example --data.columns '{response: output_gpt4}'."],
        ),
        (
            ["preview", "--data.columns", "{response: a"],
            ["is no YAML: expected ',' or '}', but got its end; allowed: a map"],
        ),
        (["preview", "--data.columns", "{response: a,\n id: b: c}"], ["is no YAML: ", "; allowed: a mapping"]),
        (["preview", "--data.columns", "{response: [a]}"], ["is not allowed; allowed: a mapping"]),
        (
            ["compare", "--variants", "{NTP: {objective: NTP}, SFTMix: {}"],
            ["is no YAML: expected ',' or '}'", "for example --variants '{NTP: {objective: NTP, "],
        ),
        (["compare", "--contrasts", "[A, B]"], ["contrasts: ", "for example --contrasts '[[SFTMix, NTP]]'"]),
        (["run", "--objective", "ntp"], ["no Objective 'ntp'. Did you mean NTP?"]),
        (["run", "--training.schedule", "COSINE"], ["Did you mean cosine?"]),
        (["run", "--training.betas", "[0.9, 0.95"], ["training.betas: '[0.9, 0.95' is no YAML: ", "list of 2 values"]),
    ],
)
def test_an_option_says_what_it_takes_and_not_what_others_take(sftmix, argv, words) -> None:
    done = sftmix(*argv)
    assert done.code == 2
    for word in words:
        assert word in done.err


def test_names_of_other_frameworks_lead_to_ours() -> None:
    for option, names in ELSEWHERE.items():
        for name in names:
            assert f"unknown option {name}. Did you mean {option}? " in str(unknown_option(name))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"objective": {"init_args": {"mu": {"class_path": "no_such.Mine"}}}},
            ["objective.mu: no Schedule 'no_such.Mine'"],
        ),
        ({"splitter": ".Mine"}, ["splitter", "no Splitter '.Mine'", "Median"]),
        ({"splitter": 3}, ["splitter: 3 is not allowed", "Median"]),
        (
            {"splitter": {"class_path": "QualityLabel", "init_args": {"high": [5, 4]}}},
            ["splitter.high: 5 is no text to YAML; put it in quotes; allowed: text, a list"],
        ),
        (
            {"splitter": {"class_path": "QualityLabel", "init_args": {"high": {"a": "b"}}}},
            ["splitter.high: ", "is not allowed; allowed: text, a list"],
        ),
        ({"objective": ["NTP"]}, ["objective: ['NTP'] is not allowed", "SFTMix"]),
        ({"model": {"path": None}}, ["model.path is null, or has no value; allowed: text."]),
        ({"training": {"epochs": None}}, ["training.epochs is null, or has no value; allowed: a number."]),
        ({"objective.mu": None}, ["objective.mu is null, or has no value; allowed: ", "Linear", "a number"]),
        (
            {"objective": {"class_path": None}},
            ["objective is null, or has no value; allowed: NTP, SFTMix, "],
        ),
        (
            {"objective": {"class_path": "SFTMix", "init_args": None}},
            ["objective.init_args is no mapping; write {class_path: CLASS, init_args: {option: value}}"],
        ),
        (
            {"callbacks": {"Evaluate": {"every": 3}}},
            ["if it is the class, write {class_path: Evaluate, init_args: {option: value}}"],
        ),
        ({"training": {"betas": [0.9]}}, ["training.betas", "a list of 2 values"]),
    ],
)
def test_a_value_of_a_file_says_so_too(values, words) -> None:
    with pytest.raises(ConfigError) as caught:
        from_plain(values)
    for word in words:
        assert word in str(caught.value)


class Outer:
    class Inner(Splitter):
        """A splitter that is named by the class around it."""

        def split(self, scores, *, seed):
            raise AssertionError


def test_a_component_may_be_a_class_inside_a_class() -> None:
    config = RunConfig(splitter=Outer.Inner())
    assert config.plain()["splitter"]["class_path"].endswith("test_values.Outer.Inner")
    assert from_plain(config.plain()) == config


def test_a_callback_that_the_package_makes_itself_is_not_offered() -> None:
    importlib.import_module("sftmix.training.dynamics")
    with pytest.raises(ConfigError, match=r"There are .*Evaluate") as caught:
        from_plain({"callbacks": ["Evaluat"]})
    assert "ScoreAtCheckpoints" not in str(caught.value)


def test_plain_values_are_left_as_they_were() -> None:
    values = RunConfig().plain()
    before = copy.deepcopy(values)
    from_plain(values)
    assert values == before
