"""What a finished command says: a dozen lines with figures of summary.json, and commands that go on from there."""

from __future__ import annotations

import io
import shlex
import subprocess
from pathlib import Path

import pytest

from sftmix.cli.results import following, held_out, results
from sftmix.training.log import figures_shown
from tests.tiny import metrics

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
GROUPS = [
    "confident: 1,500 examples, median confidence -8.03",
    "unconfident: 1,500 examples, median confidence -40.2",
    "unpaired: 1 examples",
]


def test_the_figures_of_a_training_are_told(tmp_path: Path) -> None:
    (tmp_path / "train" / "model").mkdir(parents=True)
    (tmp_path / "summary.json").touch()
    assert results(tmp_path, SUMMARY, "train") == [
        "",
        HELD_OUT,
        "Mixup: 43% of the response tokens were mixed with a token of the other of their pair",
        "mu_effective 0.92: what Mixup weighs per token, where NTP weighs 1",
        *GROUPS,
        "time: reference 0:02:30, train 2:05:00",
        "note: Mind this.",
        f"see {tmp_path / 'train' / 'model'}, {tmp_path / 'summary.json'}",
    ]


def test_the_figures_of_a_split_are_told(tmp_path: Path) -> None:
    known = {k: SUMMARY[k] for k in ("confidence", "confounds")}
    correlation = "rank correlation of confidence with response length: 0.31"
    assert results(tmp_path, known, "split") == ["", *GROUPS, correlation]


def test_what_a_run_did_not_do_is_not_mentioned(tmp_path: Path) -> None:
    assert results(tmp_path, {"stages": {}}, "reference") == [""]
    assert results(tmp_path, {"eval_nll_after": None, "mixup_tokens": 0, "ntp_tokens": 9}, "train") == [""]
    assert held_out({"eval_nll_after": None}) == []


def test_a_bar_tells_ntp_and_mixup_apart_where_pairs_are_mixed() -> None:
    step = {"loss": 4.0, "ntp": 3.0, "mixup": 5.0, "mixup_tokens": 7, "tokens_per_second": 5432.1}
    assert figures_shown(step) == "ntp 3.0000, mixup 5.0000, 5,432 tokens/s"
    assert figures_shown({**step, "mixup_tokens": 0}) == "loss 4.0000, 5,432 tokens/s"


# -------------------------------------------------------------------------------------- of real runs


def next_commands(printed: str) -> list[str]:
    """The commands that a run recommends, without the reasons behind them."""
    return [line.strip() for line in printed.partition("\nNext:\n")[2].splitlines()]


def test_a_run_ends_with_a_dozen_lines(finished) -> None:
    lines = finished.printed[finished.printed.index("\n\nheld-out NLL") :].strip().splitlines()
    assert len(lines) <= 13
    assert lines[0].startswith("held-out NLL per response token (lower is better): before ")
    assert ", NTP baseline " in lines[0]
    assert f"{finished.path / 'summary.json'}" in lines[-4]
    assert [command.split()[:2] for command in next_commands(finished.printed)] == [
        ["sftmix", "chat"],
        ["sftmix", "compare"],
    ]


@pytest.mark.slow
def test_what_a_finished_run_recommends_works(finished, sftmix, monkeypatch) -> None:
    talk, compare = next_commands(finished.printed)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    done = sftmix(*shlex.split(talk, comments=True)[1:])
    assert done.code == 0, done.err
    assert "chat: target; " in done.err
    assert sftmix(*shlex.split(compare, comments=True)[1:]).code == 0


@pytest.mark.slow
def test_what_a_run_with_adapters_recommends_works(tiny, tmp_path, sftmix) -> None:
    options = ["--training.max_steps", "2", "--model.lora.r", "2", "--out", str(tmp_path / "run")]
    done = sftmix("run", *tiny.options, *options)
    assert ", ntp " in last_line("train", done.err)
    assert ", loss " not in last_line("train", done.err)
    assert ", loss " in last_line("reference", done.err)
    export, baseline = next_commands(done.out)
    for command in (export, baseline):
        done = sftmix(*shlex.split(command, comments=True)[1:])
        assert done.code == 0, done.err
    assert (tmp_path / "run-merged" / "model.safetensors").exists()
    assert not (tmp_path / "run-merged" / "adapter_config.json").exists()
    assert len(metrics(tmp_path / "run", "baseline")) == 2
    assert "NTP baseline" in done.out


def last_line(stage: str, err: str) -> str:
    """The last line of progress of a stage."""
    return next(line for line in reversed(err.splitlines()) if f" {stage} 2/2 (100%), " in line)


def test_a_command_survives_an_odd_name_of_its_directory(tmp_path: Path) -> None:
    out = tmp_path / 'it\'s "my" $HOME `run`'
    (out / "train" / "model").mkdir(parents=True)
    (out / "config.yaml").write_text("{}\n")
    [(command, _)] = following(out, {}, "train")
    words = command.replace("sftmix", r"printf '%s\n'", 1)
    shown = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert shown.stdout.splitlines() == ["chat", str(out)]


def test_before_the_training_the_next_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}\n")
    [(command, _)] = following(tmp_path, SUMMARY, "split")
    assert command == f"sftmix run --config {tmp_path / 'config.yaml'} --out {tmp_path}"


@pytest.mark.parametrize("changed", [{"mixup_tokens": 0}, {"eval_nll_after": None}])
def test_no_comparison_is_recommended_where_it_could_say_nothing(tmp_path: Path, changed: dict) -> None:
    (tmp_path / "config.yaml").write_text("{}\n")
    assert len(following(tmp_path, SUMMARY, "train")) == 1
    assert following(tmp_path, {**SUMMARY, **changed}, "train") == []
