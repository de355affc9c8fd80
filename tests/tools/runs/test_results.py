"""What a finished command says: a dozen lines with figures of summary.json, and commands that go on from there."""

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from sftmix.cli.say import wrapped
from sftmix.components import SFTMix
from sftmix.components.base import Callback, Schedule
from sftmix.config import RunConfig
from sftmix.options.training import TrainingOptions
from sftmix.tools.runs.output import narrow_tables
from sftmix.tools.runs.results import held_out, names_own_classes, results
from sftmix.tools.runs.start import doubts
from sftmix.training.metrics import figures_shown

SUMMARY = {
    "eval_nll_before": 5.125,
    "eval_nll_after": 3.25,
    "eval_nll_best": 3.0,
    "baseline": {"eval_nll_after": 3.375},
    "confidence": {
        "confident": {"examples": 1500, "confidence_median": -8.031},
        "unconfident": {"examples": 1500, "confidence_median": -40.25},
        "unpaired": {"examples": 1},
    },
    "confounds": {
        "spearman_confidence_length": 0.31,
        "mixed_token_share": 0.43,
    },
    "mixup_tokens": 1234,
    "ntp_tokens": 5678,
    "mu_effective": 0.92,
    "stages": {"train": {"wall_seconds": 7500}, "reference": {"wall_seconds": 150.4}, "split": {}},
    "remarks": ["Mind this."],
}
HELD_OUT = "held-out NLL per response token (lower is better): before 5.1250, after 3.2500, NTP baseline 3.3750"
HELD_OUT += ", best 3.0000"
DIFFERENCE = "difference to NTP -0.1250: one seed decides nothing, see sftmix compare"
GROUPS = [
    "confident: 1,500 examples, median confidence -8.03",
    "unconfident: 1,500 examples, median confidence -40.2",
    "unpaired: 1 example",
]


def figures(out: Path, summary: dict, until: str) -> list[str]:
    """The lines before the commands that go on."""
    lines = results(out, summary, until)
    assert lines[0] == ""
    return lines[1 : lines.index("Next:")]


def test_the_figures_of_a_training_are_told(tmp_path):
    (tmp_path / "train" / "model").mkdir(parents=True)
    (tmp_path / "summary.json").touch()
    assert figures(tmp_path, SUMMARY, "train") == [
        HELD_OUT,
        DIFFERENCE,
        "Mixup: 43% of the response tokens had a partner",
        "mu_effective 0.92: a mixed token weighs 0.92 of a plain one",
        *GROUPS,
        "time: reference 0:02:30, train 2:05:00",
        "note: Mind this.",
        f"see {tmp_path / 'train' / 'model'}, {tmp_path / 'summary.json'}",
    ]


def test_the_figures_of_a_split_are_told(tmp_path):
    assert figures(tmp_path, {"confidence": SUMMARY["confidence"]}, "split") == GROUPS


def test_what_a_run_did_not_do_is_not_mentioned(tmp_path):
    assert figures(tmp_path, {"stages": {}}, "reference") == []
    assert figures(tmp_path, {"eval_nll_after": None, "mixup_tokens": 0, "ntp_tokens": 9}, "train") == []
    assert held_out({"eval_nll_after": None}) == []


def test_a_bar_tells_ntp_and_mixup_apart_where_pairs_are_mixed():
    step = {"loss": 4.0, "ntp": 3.0, "mixup": 5.0, "mixup_tokens": 7, "tokens_per_second": 5432.1}
    assert figures_shown(step) == "ntp 3.0000, mixup 5.0000, 5,432 tokens/s"
    assert figures_shown({**step, "mixup_tokens": 0}) == "loss 4.0000, 5,432 tokens/s"


class Mine(Callback):
    """A callback that is not of the package."""


class Falling(Schedule):
    """A schedule that is not of the package, within a component that is."""

    def value(self, step, total_steps):
        return 0.1


@pytest.mark.parametrize("options", [{"callbacks": [Mine()]}, {"objective": SFTMix(mu=Falling())}])
def test_commands_fit_a_run_with_classes_of_its_own(options, tmp_path):
    assert not names_own_classes(RunConfig().as_dict())
    own = names_own_classes(RunConfig(**options).as_dict())
    for until, count in (("confidence", 2), ("split", 1), ("train", 1)):
        commands = results(tmp_path, {}, until, own=own)
        assert sum("--trust " in line for line in commands) == count
        assert "--trust" not in "".join(results(tmp_path, {}, until))


def test_commands_in_messages_can_be_copied(finished, sftmix, tmp_path):
    """From a directory whose name has a blank and brackets; each is what its message is about."""
    run = tmp_path / "a [run]"
    shutil.copytree(finished.path, run)
    again = ["sftmix", "run", "--config", f"{run}/config.yaml", "--out", str(run)]
    for stage, beside, more in (("baseline", "baseline", ["--with_baseline", "true"]), ("train", "base", [])):
        shutil.rmtree(run / stage)
        ended = sftmix("chat", str(run), "--beside", beside)
        assert f"{run}: {stage} is not trained yet; this trains it: " in ended.err
        assert shlex.split(ended.err.partition("trains it: ")[2]) == again + more
    (run / "summary.json").write_text('{"stages": {}}')
    ended = sftmix("report", str(run), "--map", "0")
    assert shlex.split(ended.err.split("`")[1]) == ["sftmix", "status", str(run)]
    ended = sftmix("suspects", str(finished.tiny.train), "--out", str(tmp_path / "a [list]"))
    option = re.search(r"--data.exclude '.*?'", ended.err)[0]
    assert shlex.split(option) == ["--data.exclude", str(tmp_path / "a [list]" / "suspects.csv")]


def test_a_wide_table_is_in_parts_with_the_first_column_each():
    rows = [["figure", "NTP", "SFTMix", "a" * 30], ["loss", "1.25", "1.5", "2"]]
    assert narrow_tables(rows, 80).count("\n") == 2
    first, second = (part.splitlines() for part in narrow_tables(rows, 30).split("\n\n"))
    assert first == ["| figure | NTP  | SFTMix |", "| ------ | ---- | ------ |", "| loss   | 1.25 | 1.5    |"]
    assert [line.split(" | ")[0] for line in second] == [line.split(" | ")[0] for line in first]
    assert max(map(len, narrow_tables(rows, 26).splitlines()[:3])) == 26, "as wide as the terminal"


def test_lines_are_broken_between_words_alone():
    path, command = "/a/" * 20, "  sftmix run --config a/config.yaml --out a"
    text = f"2 bad rows:\n  {path}: no response there\n{command}\n| a | b | c | d | e | f |"
    assert wrapped(text, 20).split("\n") == [
        "2 bad rows:",
        f"  {path}:",
        "    no response",
        "    there",
        command,
        "| a | b | c | d | e | f |",
    ]
    assert wrapped(text, 200) == text


def test_a_rate_above_1_is_asked_back():
    usual, asked = ([*doubts(RunConfig(training=TrainingOptions(learning_rate=rate)))] for rate in (1.0, 2e5))
    assert usual == []
    assert asked[0].startswith("warning: training.learning_rate is 200000. Is it meant to be above 1?")


# -------------------------------------------------------------------------------------- of real runs


def test_a_run_ends_with_a_dozen_lines(finished):
    lines = finished.printed[finished.printed.index("\n\nheld-out NLL") :].strip().splitlines()
    assert len(lines) <= 14
    assert lines[0].startswith("held-out NLL per response token (lower is better): before ")
    assert ", NTP baseline " in lines[0]
    assert f"{finished.path / 'summary.json'}" in lines[-4]


@pytest.mark.slow
def test_what_a_finished_run_recommends_works(finished, tmp_path, sftmix, monkeypatch):
    run = shutil.copytree(finished.path, tmp_path / "it's my run")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    for until in ("split", "train"):
        lines = results(run, {}, until)
        for command in lines[lines.index("Next:") + 1 :]:
            done = sftmix(*shlex.split(command, comments=True)[1:])
            assert done.code == 0, done.err
