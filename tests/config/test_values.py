"""What is said of names and values that do not fit, where a type has several forms or a component holds another."""

import copy
import importlib
import re
from typing import Any, Literal

import pytest

from sftmix.components import Evaluate, Linear, SFTMix, TrainedReference
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.read import from_dict, read_yaml
from sftmix.config.values import NoValueError, Word, converted
from sftmix.options import DataOptions, ModelOptions, ReferenceModel, TrainingOptions
from sftmix.words.errors import ConfigError


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
        (["run", "--training.betas", "0.9"], ["training.betas: '0.9'", "a list [a, b]"]),
        (["run", "--splitter", "{class_path: Medin}"], ["splitter: no Splitter 'Medin'", "Did you mean Median?"]),
        (["preview", "--rows", "x"], ["rows: 'x'", "a whole number"]),
        (
            ["preview", "--data.columns", "output=output_gpt4"],
            [
                "'output=output_gpt4' is not allowed; allowed: a map",
                "for example --data.columns '{response: output_gpt4}'.",
            ],
        ),
        (
            ["preview", "--data.columns", "{response: a"],
            ["is refused, line 1: expected ',' or '}', but got"],
        ),
        (["preview", "--data.format", "my.Rows"], ["prompt_completion, text, and a class of your own by row_format"]),
        (["preview", "--row_format", "alpaca"], ["no RowFormat 'alpaca'", "our formats are words of data.format"]),
        (["preview", "--renderer", "chatml"], ["no Renderer 'chatml'", "templates are chosen by data.template"]),
        (["preview", "--data.columns", "{response: [a]}"], ["is not allowed; allowed: a mapping"]),
        (
            ["compare", "--variants", "{NTP: {objective: NTP}, SFTMix: {}"],
            ["is refused, line 1: expected ',' or '}'", "for example --variants '{NTP: {objective: NTP, "],
        ),
        (["compare", "--contrasts", "[A, B]"], ["contrasts: ", "for example --contrasts '[[SFTMix, NTP]]'"]),
        (["run", "--training.schedule", "COSINE"], ["Did you mean cosine?"]),
    ],
)
def test_an_option_says_what_it_takes_and_not_what_others_take(sftmix, argv, words):
    done = sftmix(*argv)
    assert done.code == 2
    for word in words:
        assert word in done.err


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (dict[str, float], "{1: .5, yes: 0.25, 2024-01-01: .25}", {"1": 0.5, "yes": 0.25, "2024-01-01": 0.25}),
        (dict[str, float], {2: 0.5, True: 0.5}, {"2": 0.5, "True": 0.5}),
        (dict[int, float], "{1: .5, -2: 1}", {1: 0.5, -2: 1.0}),
        (dict[str, str] | None, "{prompt: 0}", {"prompt": "0"}),
        (dict[str, str | None] | None, {"prompt": "0", "id": None}, {"prompt": "0", "id": None}),
        (dict[str, str | None] | None, "{prompt: no, id: null}", {"prompt": "no", "id": None}),
        (dict[str, Any], "{a: false, b: {c: [1, yes]}}", {"a": False, "b": {"c": [1, True]}}),
        (list[str] | str, "[no, 007, 1.0]", ["no", "007", "1.0"]),
        (list[str | None], "[no, 007, null]", ["no", "007", None]),
        (list[list[str]] | None, "[[0.4, NTP], [no, 007]]", [["0.4", "NTP"], ["no", "007"]]),
        (list[str] | str, ["no", "4.10"], ["no", "4.10"]),
        (list[str] | str, "no", "no"),
        (list[int | float | None], "[1000, .5, null]", [1000, 0.5, None]),
    ],
)
def test_texts_inside_lists_and_mappings_are_what_was_written(hint, value, expected):
    """On the command line, and in quotes in a file."""
    found = converted(value, hint)
    assert found == expected
    assert [*map(type, found)] == [*map(type, expected)]


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("labels", "[4.10, 4.1]", "4.1"),  # both were 4.1
        ("labels", "[no, yes]", "False"),
        ("labels", "[a, 0x10]", "16"),
        ("columns", "{prompt: 1.10}", "1.1"),
        ("columns", "{id: null, prompt: off}", "False"),
        ("roles", "{narrator: 1}", "1"),
    ],
)
def test_a_text_inside_a_list_or_a_mapping_of_a_file_is_in_quotes_if_yaml_reads_it_as_another_value(
    tmp_path, option, text, value
):
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{{option}: {text}}}")
    with pytest.raises(ConfigError, match=rf"data\.{option}: {value} is no text to YAML; put it in quotes; allowed: "):
        from_dict(read_yaml(path))
    quotes = re.sub(r"([\[ ])([\w.]+)(?=[],}])", r"\1'\2'", text).replace("'null'", "null")
    path.write_text(f"data: {{{option}: {quotes}}}")
    config = from_dict(read_yaml(path))
    path.write_text(config.yaml())
    assert from_dict(read_yaml(path)) == config, "as a run records it"


@pytest.mark.parametrize("value", [2, "2", Word("2")])
def test_a_number_may_be_a_choice(value):
    found = converted(value, Literal[1, 2] | None)
    assert (found, type(found)) == (2, int)
    for wrong in ("true", "1.0", True, 1.0, "3", "one"):
        with pytest.raises(NoValueError):
            converted(wrong, Literal[1, 2])


RAMP = {"class_path": "Linear", "init_args": {"start": 0}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trainning": {"epochs": 1}}, ["trainning. Did you mean training?"]),
        ({"training": {"epoch": 1}}, ["training.epoch. Did you mean training.epochs?"]),
        ({"training": {"epochs": None}}, ["training.epochs is null, or has no value; allowed: a number."]),
        (
            {"data": {"format": "alpacca"}},
            ["data.format: 'alpacca' is not allowed. Did you mean alpaca? Allowed: auto, alpaca, "],
        ),
        ({"data": 3}, ["data: 3", "a group of options {train, "]),
        ({"model": "m", "model.path": "p"}, ["model: 'm' is not allowed; allowed: a group of options {path, "]),
        ({"objective": None}, ["objective is null, or has no value; allowed: NTP, SFTMix, "]),
        ({"objective": ["NTP"]}, ["objective: ['NTP'] is not allowed", "SFTMix"]),
        ({"objective.mo": 1}, ["objective.mo: SFTMix has no option 'mo'. Did you mean mu? It takes mu, alpha, "]),
        ({"objective": "NTP", "objective.mu": 1}, ["objective.mu: NTP has no option 'mu'; it takes none"]),
        ({"objective.mu": -1}, ["objective.mu is -1"]),
        ({"objective.mu": None}, ["objective.mu is null, or has no value; allowed: ", "Linear", "a number"]),
        ({"objective.mu": "Linea"}, ["objective.mu: no Schedule 'Linea'. Did you mean Linear?", "a number"]),
        ({"objective.mu": {"class_path": "no_such.Mine"}}, ["objective.mu: no Schedule 'no_such.Mine'"]),
        ({"objective.mu": RAMP}, ["Linear needs objective.mu.end"]),
        ({"objective.mu": {**RAMP, "init_args": {"begin": 0}}}, ["objective.mu.begin", "start, end"]),
        ({"pairing": "Random"}, ["pairing: no PairSampler 'Random'. Did you mean RandomPairs?", "auto, null"]),
        ({"splitter": ".Mine"}, ["splitter", "no Splitter '.Mine'", "Median"]),
        ({"splitter": "sftmix.components.base.Splitter"}, ["splitter", "abstract"]),
        (
            {"splitter": {"class_path": "QualityLabel", "init_args": {"high": 5}}},
            ["splitter.high: 5 is no text to YAML; put it in quotes; allowed: text, a list [a, b]"],
        ),
        ({"data.labels": [None, "a"]}, ["data.labels is null, or has no value; allowed: "]),
        ({"reference": {"class_path": "FromFile"}}, ["FromFile needs reference.path"]),
        (
            {"callbacks": {"Evaluate": {"every": 3}}},
            ["callbacks.Evaluate: Evaluate has no option 'Evaluate'"],
        ),
        ({"callbacks": [{"every": 3}]}, ["callbacks is no Callback that has options; choose one first, --callbacks"]),
        ({"callbacks": [], "callbacks.every": 3}, ["callbacks is no Callback that has options; choose one first, --c"]),
        ({"pairing": None, "pairing.window": 3}, ["pairing is no PairSampler that has options", "CLASS: RandomPairs,"]),
        ({"objective.mu.start": 0}, ["objective.mu is no Schedule that has options; choose one first"]),
        ({"data.train.a": "b"}, ["data.train: {'a': 'b'} is not allowed; allowed: a list [a, b], text"]),
        ({"callbacks": [{"class_path": "Evaluate", "init_args": {"evry": 1}}]}, ["callbacks.evry", "mean every?"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, words):
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_callback_that_the_package_makes_itself_is_not_offered():
    importlib.import_module("sftmix.training.scoring")
    with pytest.raises(ConfigError, match=r"There are .*Evaluate") as caught:
        from_dict({"callbacks": ["Evaluat"]})
    assert "ScoreAtCheckpoints" not in str(caught.value)


def test_plain_values_are_left_as_they_were():
    values = RunConfig().as_dict()
    before = copy.deepcopy(values)
    from_dict(values)
    assert values == before


OF_PYTHON = [
    ({"seed": "3"}, "seed is '3', which a file of the run gives back as 3; give a value of the option's type"),
    ({"with_baseline": "no"}, "with_baseline is 'no', which a file of the run gives back as False;"),
    (
        {"training": TrainingOptions(precision="bfloat16")},
        "training.precision: 'bfloat16' is not allowed. Did you mean bf",
    ),
    (
        {"training": TrainingOptions(max_steps=10.0)},
        "training.max_steps: 10.0 is not allowed; allowed: a whole number, n",
    ),
    (
        {"data": DataOptions(train="a", multi_turn="Whole")},
        "data.multi_turn: 'Whole' is not allowed. Did you mean whole?",
    ),
    (
        {"data": DataOptions(train="a", special_tokens="txt")},
        "data.special_tokens: 'txt' is not allowed. Did you mean t",
    ),
    ({"model": "m"}, "model: 'm' is not allowed; allowed: a group of options {path, "),
    (
        {"objective": "NTP"},
        "objective is 'NTP', which a file of the run gives back as {'class_path': 'sftmix.components.",
    ),
    ({"pairing": "RandomPairs"}, "pairing is 'RandomPairs', which a file of the run gives back as {"),
    ({"callbacks": Evaluate()}, ", which a file of the run gives back as [{"),
    ({"callbacks": ["Evaluate"]}, "callbacks is ['Evaluate'], which a file of the run gives back as [{"),
    (
        {"objective": SFTMix(mu=Linear(start=0, end="1"))},
        "objective.mu.end is '1', which a file of the run gives back a",
    ),
    (
        {"reference": TrainedReference(model=ReferenceModel(max_length="9"))},
        "reference.model.max_length is '9', which a ",
    ),
]


@pytest.mark.parametrize(("given", "words"), OF_PYTHON)
def test_what_python_is_given_must_be_what_a_file_of_the_run_gives_back(given, words):
    least = {"out": "o", "model": ModelOptions(path="m"), "data": DataOptions(train="a")}
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig(**{**least, **given}))
    assert words in str(caught.value)


class _TakesAll(SFTMix):  # which no list of components in another test names
    """A class of a user who hands on what others named."""

    def __init__(self, *, gamma: float = 1.0, **kwargs: float):
        super().__init__(**kwargs)


class _InOrder(SFTMix):
    def __init__(self, *mus: float):
        super().__init__(mu=sum(mus))


@pytest.mark.parametrize(("cls", "taken"), [(_TakesAll, r"\*\*kwargs: float"), (_InOrder, r"\*mus: float")])
def test_a_component_names_each_of_its_options(cls, taken):
    config = RunConfig(out="o", model=ModelOptions(path="m"), data=DataOptions(train="a"), objective=cls())
    for checked in (lambda: validate(config), lambda: from_dict({"objective": f"{__name__}.{cls.__name__}"})):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}.__init__ takes {taken}, and its .*: name each option"):
            checked()
