"""What YAML 1.1 would read as nobody means it: numbers that are not decimal, keys, places, anchors."""

import time

import pytest

from sftmix.cli.parsing import parse, read_arguments
from sftmix.config import RunConfig
from sftmix.config.load import load
from sftmix.config.read import from_dict, read_yaml
from sftmix.disk.places import path_problem
from sftmix.options import DataOptions
from sftmix.words.errors import ConfigError
from tests.configs import read_config


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("seed", "010", 10),
        ("seed", "018", 18),
        ("seed", "-07", -7),
        ("data.limit", "0100", 100),
        ("data.limit", "1:30", None),
        ("checkpoint.every_seconds", "1:30.5", None),
        ("training.betas", "[010, 5]", (10.0, 5.0)),
        ("data.template_options.code", "007", "007"),
        ("data.template_options.code", "1:30", "1:30"),
    ],
)
def test_a_number_is_decimal_or_none(option, text, value, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"{option}: {text}\n")
    for read in (lambda: read_config(path), lambda: parse(read_arguments([f"--{option}", text]))[0]):
        if value is None:
            with pytest.raises(ConfigError, match=rf"{option}: '{text}' is not allowed; allowed: a "):
                read()
        else:
            found = read().as_dict()
            for name in option.split("."):
                found = found[name]
            assert found == ([*value] if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("10", 10), ("1e3", 1000), ("-3", -3), ("0.5", 0.5), (".5", 0.5)]
)
def test_other_numbers_are_what_they_were(text, value):
    config = parse(read_arguments(["--training.max_grad_norm", text]))[0]
    assert config.training.max_grad_norm == value


def test_a_number_of_too_many_digits_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"training\.learning_rate: 1000"):
        from_dict({"training": {"learning_rate": 10**400}})


def test_text_of_digits_stays_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: '010', labels: [\"018\"], template_options: {code: '1:30'}}\n")
    read, words = (
        read_config(path).data,
        parse(read_arguments(["--data.train", "010", "--data.labels", "[018]"]))[0].data,
    )
    assert (words.train, words.labels) == (read.train, read.labels) == (["010"], ["018"])
    assert read.template_options == {"code": "1:30"}
    again = RunConfig(data=DataOptions(train=["018", "010", "1:30", "0:30"], template_options={"code": "018"}))
    path.write_text(again.yaml())
    assert read_config(path) == again


@pytest.mark.parametrize("value", ["!!int ''", "!!bool x", "!!timestamp x"])
def test_a_tag_that_does_not_fit_its_value_is_no_yaml(value, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"seed: {value}\n")
    for read in (lambda: read_config(path), lambda: parse(read_arguments(["--seed", value]))):
        with pytest.raises(ConfigError, match="a tag does not fit its value"):
            read()


def test_keys_are_text():
    """The names of variants, above all, of which YAML makes true, false or a number."""
    text = "variants:\n  on: {seed: 1}\n  off: {seed: 2}\n  yes: {}\n  010: {}\n  2024-01-01: {}\n  null: {}\n"
    assert [*load(text)["variants"]] == ["on", "off", "yes", "010", "2024-01-01", "null"]
    assert load("{a: yes, b: off}") == {"a": True, "b": False}


def test_keys_that_begin_with_x_hold_anchors(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("x-rates: &rates {learning_rate: 1.0e-3, epochs: 2}\ntraining: *rates\nx-of_mine: 3\n")
    assert [*read_yaml(path)] == ["training"]
    training = read_config(path).training
    assert (training.learning_rate, training.epochs) == (1e-3, 2.0)
    path.write_text("training: {x-of_mine: 3}\n")
    with pytest.raises(ConfigError, match=r"unknown option training\.x-of_mine"):
        read_config(path)


@pytest.mark.parametrize("place", ["$SCRATCH/run", "runs/${NAME}"])
def test_a_variable_in_the_name_of_a_run_directory_is_refused(place):
    assert "the shell replaces" in (path_problem(place) or "")
    assert path_problem("cost-5$/run") is None


def test_epochs_and_steps_of_one_command_line_exclude_each_other(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {max_steps: 5}\n")
    epochs, steps = ["--training.epochs", "1"], ["--training.max_steps", "9"]
    with pytest.raises(ConfigError, match=r"training\.epochs 1\.0 and training\.max_steps 9 exclude each other"):
        parse(read_arguments([*epochs, *steps]))
    for words in (epochs, steps, [*epochs, "--training.max_steps", "null"]):
        parse(read_arguments(["--config", str(path), *words]))


def test_a_text_has_bounds_in_characters_values_and_levels():
    """60 MB took more than a minute, and was refused then."""
    began = time.process_time()
    with pytest.raises(ValueError, match="it has 60,000,000 characters; at most 1,048,576 are read"):
        load("- a\n" * 15_000_000)
    assert time.process_time() - began < 1
    assert load("a: " + "x" * (2**20 - 3)) == {"a": "x" * (2**20 - 3)}
    with pytest.raises(ValueError, match="it has 1,048,577 characters"):
        load("a: " + "x" * (2**20 - 2))
    assert len(load("[" + "a," * 99_999 + "]")) == 99_999
    with pytest.raises(ValueError, match="over 100,000 values"):
        load("[" + "a," * 100_000 + "]")
    deep = load("[" * 100 + "a" + "]" * 100)
    for _ in range(100):
        (deep,) = deep
    assert deep == "a"
    for levels in (101, 5_000):
        with pytest.raises(ValueError, match="over 100 levels"):
            load("[" * levels + "a" + "]" * levels)
