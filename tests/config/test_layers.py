"""`base:` in configuration files: what is applied over what, on the command line and in Python, and what is refused."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from sftmix.cli.parsing import parse, read_arguments
from sftmix.components import Linear, Median, Schedule, SFTMix
from sftmix.config import RunConfig
from sftmix.config.merge import build, merge
from sftmix.config.read import config_file, from_dict, read_layers
from sftmix.options import DataOptions
from sftmix.words.errors import ConfigError
from tests.components.examples import Shares
from tests.configs import read_config

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path) -> Write:
    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
        return path

    return make


def on_the_command_line(*argv: str) -> RunConfig:
    return parse(read_arguments(argv))[0]


def test_a_byte_order_mark_is_no_part_of_a_file_and_other_encodings_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("seed: 7\r\n".encode("utf-8-sig"))
    assert read_config(path).seed == 7
    path.write_bytes("seed: 7\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: it is in UTF-16; save it as UTF-8"):
        read_config(path)


@pytest.mark.parametrize("text", ["{id: null}", '{"id": null}', "{id: ~}"])
def test_a_column_may_be_null(text, tmp_path):
    config = on_the_command_line("--data.columns", text)
    assert config.data.columns == {"id": None}
    path = tmp_path / "run.yaml"
    path.write_text(config.yaml(), encoding="utf-8")
    assert read_config(path) == config


SPELLED = {"version": "3.10", "plain": "no", "date": "2024-07-26", "inner": {"code": "007"}, "list": ["1e3"]}


def test_a_quoted_text_stays_text_and_a_word_of_the_command_line_is_read_once(write):
    """Without a type nothing else says that it is one."""
    made = RunConfig(data=DataOptions(template_options=SPELLED))
    read = read_config(write("run.yaml", made.yaml()))
    assert from_dict(made.as_dict()) == read == made
    assert read.data.template_options == SPELLED
    options = "--data.template_options"
    words = on_the_command_line(options, '{version: "3.10", plain: no}', "--out", "a")
    assert words.data.template_options == {"version": "3.10", "plain": False}
    words = on_the_command_line(f"{options}.version", '"3.10"', f"{options}.code", "3.10", f"{options}.open", "[")
    assert words.data.template_options == {"version": "3.10", "code": 3.1, "open": "["}
    assert yaml.safe_load(words.yaml()) == words.as_dict()


def test_a_file_is_applied_over_its_bases_in_order(write):
    write("first.yaml", "seed: 1\ntraining: {epochs: 1, learning_rate: 1e-4, eps: 1.0e-6}\n")
    write("deep/second.yaml", "base: ../first.yaml\nseed: 2\ntraining: {epochs: 2}\n")
    last = write("last.yaml", "base: [deep/second.yaml]\ntraining: {epochs: 3}\n")
    expected = RunConfig(seed=2)
    expected.training.epochs, expected.training.learning_rate, expected.training.eps = 3.0, 1e-4, 1e-6
    assert read_config(last) == expected
    assert on_the_command_line("--config", str(last)) == expected
    assert [Path(name).name for name, _ in read_layers(last)] == ["first.yaml", "second.yaml", "last.yaml"]


def test_a_base_that_two_files_share_is_applied_once_and_undoes_neither(write):
    write("dc.yaml", "training: {learning_rate: 1e-5, epochs: 1}\n")
    da = write("da.yaml", "base: dc.yaml\ntraining: {learning_rate: 5e-4}\n")
    db = write("db.yaml", "base: dc.yaml\ntraining: {eps: 1e-6}\n")
    both = write("both.yaml", "base: [da.yaml, db.yaml]\n")
    assert [Path(name).name for name, _ in read_layers(both)] == ["dc.yaml", "da.yaml", "db.yaml", "both.yaml"]
    for words in (["--config", str(both)], ["--config", str(da), "--config", str(db)]):
        training = on_the_command_line(*words).training
        assert (training.learning_rate, training.eps, training.epochs) == (5e-4, 1e-6, 1.0)
    named = on_the_command_line("--config", str(da), "--config", str(da.parent / "dc.yaml"))
    assert named.training.learning_rate == 1e-5  # no base here: it was asked for, and last


def test_a_group_of_a_component_is_changed_over_a_file_that_has_it(write):
    file = write("a.yaml", "reference.training: {learning_rate: 1e-3}\nreference.model: {path: a, lora: {r: 3}}\n")
    words = ("learning_rate", "1e-6"), ("epochs", "2")
    config = on_the_command_line(
        *("--config", str(file), "--reference.model.path", "b", "--reference.model.lora.lora_alpha", "4"),
        *(word for name, value in words for word in (f"--reference.training.{name}", value)),
    )
    options = config.reference.spec()["init_args"]
    assert (options["training"]["learning_rate"], options["training"]["epochs"]) == (1e-6, 2.0)
    model = options["model"]
    assert (model["path"], model["lora"]["r"], model["lora"]["lora_alpha"]) == ("b", 3, 4)


def test_a_group_may_be_in_braces_on_the_command_line():
    """A more precise key is applied over it, wherever it stands."""
    config = on_the_command_line(
        *("--training.eps", "1e-6", "--training", "{epochs: 2, eps: 1e-4}"),
        *("--model", '{path: "007", lora: {r: 3}}', "--reference.model", "{path: b}"),
    )
    assert (config.training.epochs, config.training.eps) == (2.0, 1e-6)
    assert (config.model.path, config.model.lora.r) == ("007", 3)
    assert config.reference.spec()["init_args"]["model"]["path"] == "b"
    with pytest.raises(ConfigError, match=r"training\.epochs 2\.0 and training\.max_steps 5 exclude each other"):
        on_the_command_line("--training", "{epochs: 2, max_steps: 5}")


class _Stepwise(SFTMix):
    """An objective whose mu follows several schedules, if any."""

    def __init__(self, *, parts: list[Schedule] | None = None, at: dict[int, float] | None = None):
        super().__init__()
        self.parts, self.at = parts, at


@dataclass
class _Record(Median):
    """A splitter that is a dataclass, whose lists and components are made anew for each."""

    shares: list[float] = field(default_factory=lambda: [0.5])
    at: dict[str, float] = field(default_factory=dict)
    mu: Schedule = field(default_factory=lambda: Linear(start=0.1, end=0.2))


def test_a_component_may_be_a_dataclass(write):
    """Its defaults that are made anew are in the run's file, as they are in it."""
    linear = {"start": 0.1, "end": 0.2}
    for given in ({}, {"shares": [0.1, 0.9]}, {"at": {"a": 2.0}}):
        config = RunConfig(splitter=_Record(**given))
        options = config.splitter.spec()["init_args"]
        assert options["mu"]["init_args"] == linear
        assert {key: options[key] for key in ("shares", "at")} == {"shares": [0.5], "at": {}, **given}
        read = read_config(write("run.yaml", config.yaml()))
        assert read == config
        assert isinstance(read.splitter, _Record)
        assert (read.splitter.shares, read.splitter.at) == (config.splitter.shares, config.splitter.at)
    path = f"{__name__}._Record"
    assert on_the_command_line("--splitter", path, "--splitter.shares+", "1").splitter.spec()["init_args"][
        "shares"
    ] == [0.5, 1]
    assert _Record().shares is not _Record().shares


def test_a_list_of_components_may_be_none_and_a_mapping_may_have_numbers_as_names(write):
    for parts in (None, [Linear(start=0.1, end=0.2)]):
        config = RunConfig(objective=_Stepwise(parts=parts, at={10: 0.5}))
        read = read_config(write("run.yaml", config.yaml()))
        assert read == config
        assert isinstance(read.objective, _Stepwise)
        assert read.objective.at == {10: 0.5}
        assert (read.objective.parts is None) is (parts is None)


def test_a_key_with_dots_changes_one_entry_of_a_mapping(write):
    """Also among the options of a component; a mapping replaces the whole one."""
    options = "data: {template_options: {version: 1, date: x}, columns: {prompt: q}, limit: 3}"
    selector = {"class_path": f"{Shares.__module__}.Shares", "k": 4, "field": "f", "shares": {"a": 0.5, "b": 0.5}}
    file = write("run.yaml", f"{options}\nselector: {selector}")
    more = "base: run.yaml\ndata.columns.output: r\ndata.columns.id: null\n"
    argv = "--data.template_options.version", '"3"', "--selector.shares.a", "0.25", "--selector.shares.c", "0.25"
    found = on_the_command_line("--config", str(write("more.yaml", more)), *argv, "--data.limit", "4")
    assert found.data.template_options == {"version": "3", "date": "x"}
    assert found.data.columns == {"prompt": "q", "output": "r", "id": None}
    assert found.selector.shares == {"a": 0.25, "b": 0.5, "c": 0.25}
    assert yaml.safe_load(found.yaml()) == found.as_dict()
    for last in ({"data": {"columns": {"output": "r"}}}, {"data.columns": {}, "data.columns.output": "r"}):
        replaced = build(merge(merge({}, read_layers(file)[0][1]), last)).data
        assert (replaced.columns, replaced.limit) == ({"output": "r"}, 3)


def test_a_recipe_is_a_base_by_its_name(write):
    mine = write("mine.yaml", "base: recipe:quickstart\ntraining: {epochs: 1}\n")
    whole = read_config(config_file("recipe:quickstart"))
    whole.training.epochs = 1.0
    assert read_config(mine) == whole
    assert read_layers(mine)[0][0] == "recipe:quickstart"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.yaml": "base: missing.yaml"}, ["a.yaml: base: no file", "missing.yaml"]),
        (
            {"a.yaml": "base: recipe:table5-rol"},
            ["a.yaml: base: no recipe", "mean table5-role? Shipped rec"],
        ),
        ({"a.yaml": "base: {b: 1}"}, ["base is {'b': 1}", "allowed"]),
        ({"a.yaml": "base: b.yaml", "b.yaml": "training: {epoch: 1}"}, ["b.yaml: unknown option", "training.epochs?"]),
        ({"a.yaml": "base: b.yaml", "b.yaml": ""}, ["b.yaml is not a configuration"]),
        ({"a.yaml": "base: b.yaml", "b.yaml": "{"}, ["cannot read the configuration", "b.yaml"]),
        ({"a.yaml": "variants: {x: {}}"}, ["a.yaml", "`variants`", "compare --config"]),
        ({"a.yaml": "base: recipe:table5-role"}, ["recipe:table5-role", "`variants`", "compare --config"]),
        (
            {"a.yaml": "training: {epochs: 2, max_steps: 5}"},
            ["a.yaml: training.epochs 2.0 and training.max_steps 5 ex"],
        ),
        ({"a.yaml": "training: {epochs: 2}\ntraining.max_steps: 5"}, ["a.yaml: training.epochs 2.0 and training.m"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(write, files, words):
    paths = [write(name, text) for name, text in files.items()]
    for read in (read_config, lambda path: on_the_command_line("--config", str(path))):
        with pytest.raises(ConfigError) as error:
            read(paths[0])
        for word in words:
            assert word in str(error.value)


def test_epochs_and_steps_of_two_layers_and_of_a_written_file_go_together(write):
    """The later layer decides, and a file that a run wrote has every option."""
    base = write("base.yaml", "training.max_steps: 5")
    write("over.yaml", "base: base.yaml\ntraining: {epochs: 2, max_steps: null}")
    assert read_config(base.with_name("over.yaml")).training.max_steps is None
    config = on_the_command_line("--config", str(base), "--training.epochs", "2")
    assert (config.training.epochs, config.training.max_steps) == (2.0, 5)
    assert read_config(write("written.yaml", config.yaml())) == config


def test_keys_that_are_merged_and_aliases_do_not_stand_twice(write):
    text = "seed: 3\ntraining: &a {epochs: 2, eps: 1.0e-6}\nreference: {training: {<<: *a, epochs: 1}}\n"
    config = read_config(write("merged.yaml", text))
    assert (config.training.epochs, config.reference.training.epochs, config.reference.training.eps) == (2, 1, 1e-6)
    itself = "base: &a [*a]\n"
    with pytest.raises(ConfigError, match="over 100 levels"):
        read_config(write("itself.yaml", itself))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training: {learning_rate: 1.0e-4}\nseed: 1\ntraining: {epochs: 1}\n", "training is in lines 1 and 3;"),
        ("objective:\n  class_path: SFTMix\n  init_args:\n    mu: 0.1\n    mu: 0.2\n", "mu is in lines 4 and 5;"),
        ("callbacks:\n- class_path: Evaluate\n  class_path: Stop\n", "class_path is in lines 2 and 3;"),
    ],
)
def test_a_key_that_stands_twice_is_refused(write, text, told):
    """YAML takes the last one: the options of the first block would be gone without a word."""
    with pytest.raises(ConfigError, match=told):
        read_config(write("twice.yaml", text))


QUANTILE = {"splitter": {"class_path": "Quantile", "init_args": {"levels": 6}}}
DEFAULT = ["Calibration", "Remarks", "Evaluate"]
RAMP = {"class_path": "Linear", "init_args": {"start": 0, "end": 1}}


@pytest.mark.parametrize(
    ("dotted", "nested"),
    [
        ({"training.max_steps": 3, "training": {"eps": 0.5}}, {"training": {"max_steps": 3, "eps": 0.5}}),
        ({"splitter": "Quantile", "splitter.levels": 6}, QUANTILE),
        ({"splitter.init_args.levels": 6, "splitter.class_path": "Quantile"}, QUANTILE),
        (
            {"objective.mu.start": 0, "objective.mu": "Linear", "objective.mu.init_args.end": 1},
            {"objective": {"init_args": {"mu": RAMP}}},
        ),
        ({"model": {"lora.r": 4}, "model.lora": {"bias": "all"}}, {"model": {"lora": {"r": 4, "bias": "all"}}}),
        ({"data.train+": "b", "data": {"train": "a"}}, {"data": {"train": ["a", "b"]}}),
        (
            {"callbacks.every": 3, "callbacks+": "MeasureMixing"},
            {
                "callbacks": [
                    "Calibration",
                    "Remarks",
                    "Evaluate",
                    {"class_path": "MeasureMixing", "init_args": {"every": 3}},
                ]
            },
        ),
        ({"callbacks": None}, {"callbacks": []}),
        ({"callbacks": "null", "callbacks+": "Evaluate"}, {"callbacks": ["Evaluate"]}),
        (
            {"callbacks": "Evaluate", "callbacks+": "MeasureMixing", "callbacks.every": 3},
            {"callbacks": ["Evaluate", {"class_path": "MeasureMixing", "init_args": {"every": 3}}]},
        ),
    ],
)
def test_keys_with_dots_are_the_nested_ones_in_any_order(dotted, nested):
    for keys in (dotted, dict(reversed(dotted.items()))):
        assert from_dict(keys) == from_dict(nested) != RunConfig()
