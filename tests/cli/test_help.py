"""The help: what matters on one screen, the rest on demand, and only what a command reads."""

import re
from typing import get_args, get_type_hints

import pytest

from sftmix.cli.commands import COMMANDS
from sftmix.cli.help import OF_READING, OF_ROWS, OF_SPLIT, OF_TARGET, OF_TRAINING, option_docs
from sftmix.config import RunConfig
from sftmix.config.schema import component_bases, option_hints
from sftmix.tools.estimate.command import EstimateOptions
from sftmix.tools.trackers import TRACKERS
from sftmix.tools.trackers import command as track
from sftmix.tools.verify import command as verify
from sftmix.tools.verify import window
from sftmix.training.gpus import GPUS

OF_A_RUN = ("run", "reference", "confidence", "split", "train", "compare", "estimate", "preview")


def options(text: str) -> set[str]:
    """The options that have a line of their own, without dashes."""
    return set(re.findall(r"^  --([\w.]+)", text, re.M))


@pytest.fixture(autouse=True)
def _a_terminal_of_80_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


JARGON = ("class_path", "init_args", "subclass", "SUPPRESS", "<class", "Literal", "Union", "==", "MISSING", "NoneType")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_has_an_example_and_no_jargon(sftmix, name):
    for words in ([], ["all"]) if name in OF_A_RUN else ([],):
        done = sftmix(name, "--help", *words)
        assert (done.code, done.err) == (0, "")
        assert f"sftmix {name}" in done.out.partition("usage:")[2].partition("\n\n")[2]
        assert [word for word in JARGON if word in done.out] == []


def test_the_help_of_run_fits_a_screen(sftmix):
    text = sftmix("run", "--help").out
    assert len(text.splitlines()) <= 45
    assert 20 <= len(options(text)) <= 25
    assert options(text) == options(OF_ROWS + OF_TRAINING + OF_SPLIT + OF_TARGET)
    for line in text[text.index("\noptions:\n") :].splitlines():
        assert len(line) <= 80, line
        assert not line.startswith("   "), f"an option on two lines: {line}"


def test_the_short_help_names_defaults_as_they_are():
    """It is written by hand; in the long one the defaults are the classes' own."""
    text = OF_ROWS + OF_READING + OF_TRAINING + OF_SPLIT + OF_TARGET
    told = dict(re.findall(r"^  --([\w.]+) .* \[([^]]+)]$", text, re.M))
    assert len(told) == 11
    for key, default in told.items():
        value: object = RunConfig()
        for name in key.split("."):
            value = getattr(value, name)
        assert default == (type(value).__name__ if key in component_bases() else str(value))


@pytest.mark.parametrize("name", OF_A_RUN)
def test_the_short_help_is_short_and_ends_with_the_way_to_the_rest(sftmix, name):
    short, full = sftmix(name, "--help").out, sftmix(name, "--help", "all").out
    assert len(short.splitlines()) <= 55
    assert {"model.path", "data.train"} <= options(short) <= options(full)
    assert "All options: --help all. One group in full: --help GROUP, of model," in short


def test_the_whole_help_of_run_names_every_option(sftmix):
    text = sftmix("run", "--help", "all").out
    assert option_hints().keys() <= options(text)
    assert {"objective.mu", "reference.training.epochs", "callbacks.every"} <= options(text)
    assert "[2e-06]" in text


@pytest.mark.parametrize("topic", ["data", "training", *component_bases(), "model.lora", "reference.training"])
def test_a_topic_shows_its_options_and_no_others(sftmix, topic):
    every = options(sftmix("run", "--help", "all").out)
    done = sftmix("run", "--help", topic)
    assert done.code == 0
    assert options(done.out) == {key for key in every if f"{key}.".startswith(f"{topic}.")}
    assert done.out == sftmix("run", f"--help={topic}").out


def test_a_single_option_is_explained_in_full(sftmix):
    assert (
        "  --training.epochs VALUE  Passes over the training rows. [3.0]\n"
        in sftmix("run", "--help", "training.epochs").out
    )


def test_an_unknown_topic_names_the_nearest(sftmix):
    done = sftmix("run", "--help", "trainng")
    assert (done.code, done.out) == (2, "")
    assert "unknown option trainng. Did you mean training?" in done.err


@pytest.mark.parametrize("name", ["reference", "confidence", "split", "preview"])
def test_what_a_command_does_not_use_is_not_in_its_short_help(sftmix, name):
    assert options(sftmix(name, "--help").out).isdisjoint({"objective", "objective.mu", "with_baseline"})


def test_components_lists_all_and_shows_one(sftmix):
    out = sftmix("components").out
    for name in ("--objective", "SFTMix", "NTP", "Median", "RandomSplit", "Perplexity", "TrainedReference", "Evaluate"):
        assert name in out
    shown = sftmix("components", "SFTMix").out
    assert "chosen by --objective SFTMix\n" in shown
    assert re.search(r"--objective\.mu VALUE .*\n.*\[0\.2\]", shown)
    assert sftmix("components", "sftmix.components.objectives.SFTMix").out == shown
    assert sftmix("components", "FromFile").out.count("chosen by --") == 3


def test_what_a_docstring_repeats_of_a_module_is_what_stands_there():
    """The help is read from docstrings, which hold no values."""
    of_verify = option_docs(verify.Options)["steps"]
    assert f"{window.STEPS} if they are over {window.NEAR} away" in of_verify
    assert option_docs(EstimateOptions)["gpu"].startswith(f"{', '.join(GPUS)} or cpu;")
    assert set(get_args(get_type_hints(track.Options)["to"])) == set(TRACKERS)


def test_a_help_names_what_its_example_and_its_page_use(sftmix):
    """split has its splitter, preview what a data file may want."""
    assert {"splitter", "confidence"} <= options(sftmix("split", "--help").out)
    assert {"data.skip_bad", "data.columns", "data.exclude", "data.format"} <= options(sftmix("preview", "--help").out)
    assert "--finite_differences [VALUE]" in sftmix("components", "--help").out
