"""Places on the command line that cannot be read or written: one line and exit code 2, before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sftmix.cli.parsing import parse, read_arguments
from sftmix.words.errors import ConfigError

Call = Callable[..., SimpleNamespace]
NOT_YOURS = "is a file, or not yours to write; name a place in a directory of yours"


@pytest.mark.parametrize(
    "argv",
    [
        ["quickstart", "--out", "a_file/x"],
        ["export", "r", "--to", "a_file/x/y"],
    ],
)
def test_a_place_below_a_file_cannot_be_written(sftmix, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("mine")
    ended = sftmix(*argv)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: --{argv[-2][2:]}: {argv[-1]!r} cannot be written: a_file {NOT_YOURS}\n"
    assert Path("a_file").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trust=no"], "--trust=no: this option takes no value; write --trust, or leave it out"),
        (["--print_config=false"], "--print_config=false: this option takes no value"),
        (["--data.train+", "--seed", "3"], "--data.train+ needs a value behind it"),
        (["--data.labels+"], "--data.labels+ needs a value behind it"),
        (["--config"], "--config needs a value behind it"),
        (["--config", "--seed", "3"], "--config needs a value behind it"),
    ],
)
def test_an_option_has_a_value_or_none(argv, message):
    """`--trust=no` trusted, and a file or label of the name True was looked for."""
    with pytest.raises(ConfigError) as error:
        read_arguments(argv)
    assert str(error.value).startswith(message)


def test_the_home_directory_is_meant_by_its_sign_behind_an_equals_sign_too(tmp_path, monkeypatch):
    """Where the shell does not replace it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _, _ = parse(read_arguments(["--out=~/runs/first"]))
    assert config.out == str(tmp_path / "runs" / "first")


OF_RUNS = [["--model.path", "m"], ["--data.train", "a", "b"], ["--data.eval", "a"], ["--trust"]]


@pytest.mark.parametrize("words", OF_RUNS, ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["suspects", "rows.jsonl"], "--model names one that scores these rows"),
        (["chat", "no-run", "--beside", "base"], "a model is named itself"),
        (["generate", "no-run", "--to", "x.jsonl", "--models", "target, other"], "a model is named itself"),
        (["evaluate", "no-run", "--tasks", "x"], "a model is named itself"),
    ],
    ids=lambda value: value[0],
)
def test_options_of_runs_are_refused_if_no_run_is_named(sftmix, tmp_path, monkeypatch, words, command, remedy):
    """Elsewhere they were ignored: the model that suspects was to score by was none."""
    monkeypatch.chdir(tmp_path)
    done = sftmix(*command, *words)
    said = f"{words[0]}: for a run, and {command[1]} is none; leave it out ({remedy})"
    assert (done.code, said in done.err) == (2, True), done.err


def test_options_of_runs_are_taken_if_one_of_several_models_is_of_a_run(finished, sftmix, tmp_path):
    model = str(finished.path / "train" / "model")
    words = ("generate", model, "--prompts", str(tmp_path / "none.jsonl"), "--to", str(tmp_path / "x"), "--trust")
    done = sftmix(*words, "--models", f"target, {finished.path}")
    assert "none.jsonl: no such file or directory" in done.err
    assert f"--trust: for a run, and {model} is none" in sftmix(*words).err
