"""The help: what matters on one screen, the rest on demand, and only what a command reads."""

from __future__ import annotations

import re

import pytest

from sftmix.cli.commands import COMMANDS
from sftmix.cli.help import READ, SHORT
from sftmix.config.schema import component_bases, option_groups, option_hints

OF_A_RUN = ("run", "reference", "confidence", "split", "train", "compare", "estimate", "preview")


def options(text: str) -> set[str]:
    """The options that have a line of their own, without dashes."""
    return set(re.findall(r"^  --([\w.]+)", text, re.M))


@pytest.fixture(autouse=True)
def _a_terminal_of_80_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_has_an_example_and_no_jargon(sftmix, name) -> None:
    for words in ([], ["all"]) if name in OF_A_RUN else ([],):
        done = sftmix(name, "--help", *words)
        assert (done.code, done.err) == (0, "")
        assert f"sftmix {name}" in done.out.partition("usage:")[2].partition("\n\n")[2]
        for jargon in (
            "class_path",
            "init_args",
            "subclass",
            "SUPPRESS",
            "<class",
            "Literal",
            "Union",
            "==",
            "MISSING",
        ):
            assert jargon not in done.out
        assert "NoneType" not in done.out


def test_the_help_of_run_fits_a_screen(sftmix) -> None:
    text = sftmix("run", "--help").out
    assert len(text.splitlines()) <= 45
    assert options(text) == set(SHORT)
    for line in text[text.index("\nRun\n") :].splitlines():
        assert len(line) <= 80, line
        assert not line.startswith("   "), f"an option on two lines: {line}"
    assert re.search(r"\n\nAll \d+ options: --help all\. One group in full: --help GROUP, of run, [\w,\s]+\.\n$", text)


@pytest.mark.parametrize("name", OF_A_RUN)
def test_the_short_help_is_short_and_ends_with_the_way_to_the_rest(sftmix, name) -> None:
    short, full = sftmix(name, "--help").out, sftmix(name, "--help", "all").out
    assert len(short.splitlines()) <= 55
    assert options(short) <= options(full)
    assert f"All {len({key for key in options(full) if not key.endswith('.')})} options: --help all." in short
    assert "--help GROUP, of run," in short


def test_the_whole_help_of_run_names_every_option(sftmix) -> None:
    text = sftmix("run", "--help", "all").out
    assert option_hints().keys() <= options(text)
    assert {"objective.mu", "reference.training.epochs", "callbacks.every"} <= options(text)
    assert "[2e-06]" in text


@pytest.mark.parametrize("topic", [*option_groups(), *component_bases(), "model.lora", "reference.training"])
def test_a_topic_shows_its_options_and_no_others(sftmix, topic) -> None:
    every = options(sftmix("run", "--help", "all").out)
    done = sftmix("run", "--help", topic)
    assert done.code == 0
    assert options(done.out) == {key for key in every if f"{key}.".startswith(f"{topic}.")}
    assert done.out == sftmix("run", f"--help={topic}").out


def test_a_single_option_is_explained_in_full(sftmix) -> None:
    assert sftmix("run", "--help", "training.epochs").out.splitlines()[1:3] == [
        "  --training.epochs X         Passes over the training rows. [3.0]",
        "",
    ]


def test_an_unknown_topic_names_the_nearest(sftmix) -> None:
    done = sftmix("run", "--help", "trainng")
    assert (done.code, done.out) == (2, "")
    assert "'trainng'" in done.err
    assert "Did you mean training?" in done.err
    assert sftmix("preview", "--help", "training").code == 2


@pytest.mark.parametrize("name", sorted(READ))
def test_a_command_shows_what_it_reads(sftmix, name) -> None:
    short, full = sftmix(name, "--help").out, sftmix(name, "--help", "all").out
    idle = {"objective", "perturbation", "pairing", "with_baseline"}
    idle |= {"training", "reference", "out", "checkpoint", "optimizer", "callbacks"} if name == "preview" else set()
    idle |= {"confidence"} if name in ("preview", "reference") else set()
    idle |= {"splitter"} if name != "split" else set()
    for text in (short, full):
        assert not {key for key in options(text) if key.partition(".")[0] in idle}
        assert {"model.path", "data.train", "config"} <= options(text)
    assert {key for key in option_hints() if key.startswith("data.")} <= options(full)
    assert "checkpoint.keep_best" not in options(full)  # no held-out rows are evaluated before the target
    if name == "preview":
        assert options(full) & {"model.lora.r", "model.dtype"} == set()
        assert {"rows", "no_color", "data.template", "selector"} <= options(short)
