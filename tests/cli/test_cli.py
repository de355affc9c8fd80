"""The command line through `main`: every option, their order, what is said about wrong ones, and exit codes."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from sftmix import __version__
from sftmix.cli import main
from sftmix.cli.commands import COMMANDS
from sftmix.cli.parsing import parse, read_arguments
from sftmix.config import RunConfig
from sftmix.config.read import from_dict
from sftmix.words import errors
from tests.configs import read_config

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call_main(capsys, monkeypatch) -> Run:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def configured() -> Callable[..., RunConfig]:
    """The configuration that `run` would use."""
    return lambda *argv: parse(read_arguments(argv))[0]


def at(config: RunConfig, key: str) -> Any:
    """The value at a dotted key of the plain form; options of components lie directly below them."""
    value: Any = config.as_dict()
    for name in key.split("."):
        value = value["init_args"] if isinstance(value, dict) and "init_args" in value else value
        value = value[name]
    return value["class_path"].rpartition(".")[2] if isinstance(value, dict) and "class_path" in value else value


OPTIONS = [
    ("seed", "7", 7),
    ("data.train", "[a.json, b.json]", ["a.json", "b.json"]),
    ("data.columns", "{prompt: question}", {"prompt": "question"}),
    ("data.max_length", "null", None),
    ("data.skip_bad", None, True),
    ("reference.checkpoints", "[0, 0.5, 1]", [0.0, 0.5, 1.0]),
    ("pairing", "null", None),
    ("objective", "sftmix.components.objectives.NTP", "NTP"),
    ("training.betas", "[0.8, 0.9]", [0.8, 0.9]),
    ("training.epochs", "0.5", 0.5),
]


@pytest.mark.parametrize(("key", "text", "value"), OPTIONS)
def test_an_option_arrives_and_changes_nothing_else(configured, key, text, value):
    config = configured(f"--{key}", *([] if text is None else [text]))
    assert at(config, key) == value
    field = key.partition(".")[0]
    default = RunConfig()
    assert {k: v for k, v in config.as_dict().items() if k != field} == {
        k: v for k, v in default.as_dict().items() if k != field
    }


@pytest.mark.parametrize("turned", [False, True])
def test_an_option_of_a_component_may_be_a_component(configured, turned):
    words = ["--objective.mu=Linear", "--objective.mu.start=0", "--objective.mu.end=0.4", "--objective.alpha=0.3"]
    config = configured(*(words[::-1] if turned else words))
    assert at(config, "objective.mu") == "Linear"
    assert (at(config, "objective.mu.start"), at(config, "objective.mu.end")) == (0.0, 0.4)
    assert at(config, "objective.alpha") == 0.3
    assert from_dict(config.as_dict()) == config


def test_several_files_are_added_in_order(configured):
    assert configured("--data.train", "a", "--data.train+", "b", "--data.train+=c").data.train == ["a", "b", "c"]


def test_callbacks_are_replaced_added_and_removed(configured):
    words = ["--callbacks.every", "7", "--callbacks+", "Evaluate", "--callbacks.every", "5"]
    assert [c["init_args"]["every"] for c in configured(*words).as_dict()["callbacks"][2:]] == [7, 5]
    assert configured("--callbacks", "[]").callbacks == []


FILE = """
objective:
  class_path: sftmix.components.objectives.SFTMix
  init_args: {mu: 0.3, alpha: 1.0}
callbacks:
- class_path: sftmix.components.callbacks.Evaluate
  init_args: {every: 7}
training: {epochs: 9}
"""


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "given.yaml"
    path.write_text(FILE)
    return str(path)


def test_the_command_line_wins_wherever_the_file_stands(configured, file):
    options = ["--objective.mu", "0.4", "--training.epochs", "2"]
    for argv in (["--config", file, *options], [*options, "--config", file], [*options, f"--config={file}"]):
        config = configured(*argv)
        assert (at(config, "objective.mu"), at(config, "objective.alpha")) == (0.4, 1.0)
        assert config.training.epochs == 2


def test_options_that_the_new_class_has_are_kept_and_no_others(call_main, file):
    code, out, err = call_main(
        "run", "--config", file, "--objective", "DecomposedMixup", "--splitter", "RandomSplit", "--print_config"
    )
    assert (code, "mu: 0.3" in out, err) == (0, True, "")
    assert (
        "objectives.NTP\n  init_args: {}"
        in call_main("run", "--config", file, "--objective", "NTP", "--print_config")[1]
    )


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--objective.mu", "0", "--pairing", "LengthMatchedPairs", "--data.train", "a", "--reference.checkpoints", "3"],
        ["--objective", "NTP", "--pairing", "null", "--callbacks", "[]", "--with_baseline", "--data.eval", "[a, b]"],
    ],
)
def test_what_print_config_prints_is_that_configuration(call_main, configured, tmp_path, argv):
    code, printed, _ = call_main("run", *argv, "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert code == 0
    assert read_config(path) == configured(*argv) == configured("--config", str(path))
    assert call_main("run", "--config", str(path), "--print_config")[1] == printed
    path.write_text(configured(*argv).yaml())
    assert configured("--config", str(path)) == configured(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["runn"], ["no command 'runn'", "quickstart", "Did you mean run?"]),
        (["run"], ["3 problems", "out is missing", "model.path is missing", "data.train is missing"]),
        (["run", "--model.template", "alpaca"], ["Did you mean data.template?"]),
        (["run", "--checkpoint.xyz", "1"], ["unknown option checkpoint.xyz; --help all lists them."]),
        (["run", "--data.train", "a", "b"], ["'b'", "--data.train+ b"]),
        (["run", "--data.train", "a", "--data.train", "b"], ["--data.train+"]),
        (["run", "stray"], ["unexpected argument 'stray'"]),
        (["run", "--out"], ["out is true, as on and yes are to YAML without quotes, or has no value; allow"]),
        (["run", "--seed+", "1"], ["seed+: seed takes one value", "data.train"]),
        (["preview", "--rows", "0", "--model.path", "m", "--data.train", "a"], ["rows is 0"]),
        (["chat", "r", "--system", "prompts/none.txt"], ["--system 'prompts/none.txt': there is no such file"]),
        (["chat", "r", "--system", "none.txt"], ["there is no such file", "a text with a blank"]),
        (["chat", "r", "--temperature", "11"], ["--temperature from 0 (greedy) to 10"]),
        (["export"], ["RUN", "export --help"]),
        (["export", "r", "--to", "d", "--dtype", "int4"], ["int4", "bfloat16"]),
        (["quickstart", "--sed", "1"], ["--sed"]),
    ],
)
def test_a_usage_error_is_one_message_and_exit_2(call_main, argv, words):
    code, out, err = call_main(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err


def raising(error: BaseException) -> Callable[[object], None]:
    def body(argv: object) -> None:
        raise error

    return body


STATUS = "sftmix.tools.status.command.main"
CODES = {"Config": 2, "Data": 3, "Checkpoint": 4, "InUse": 5, "NonFinite": 6, "LossLeap": 6, "NoSpace": 7}


@pytest.mark.parametrize(
    ("kind", "code"),
    [(errors.Stopped, 143), *((getattr(errors, f"{name}Error"), code) for name, code in CODES.items())],
)
def test_each_error_has_its_exit_code(call_main, monkeypatch, kind, code):
    monkeypatch.setattr(STATUS, raising(kind("what happened")))
    start = "stopped" if kind is errors.Stopped else "error"
    assert call_main("status", "RUN") == (code, "", f"{start}: what happened\n")


def test_an_interruption_is_130_and_a_surprise_keeps_its_traceback(call_main, monkeypatch):
    monkeypatch.setattr(STATUS, raising(KeyboardInterrupt()))
    assert call_main("status", "RUN")[0] == 130
    monkeypatch.setattr(STATUS, raising(ZeroDivisionError("a surprise")))
    with pytest.raises(ZeroDivisionError, match="a surprise"):
        call_main("status", "RUN")


def test_only_rank_0_repeats_what_all_ranks_find(call_main, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert call_main("run", "--epochs", "1") == (2, "", "")
    monkeypatch.setattr(STATUS, raising(errors.DataError("here")))
    assert call_main("status", "RUN") == (3, "", "[rank 1] error: here\n")


def test_version_and_overview(call_main):
    assert call_main("--version") == (0, f"sftmix {__version__}\n", "")
    code, out, _ = call_main("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert call_main()[0] == 2
