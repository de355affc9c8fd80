"""Runs whose files have moved, and stages whose callbacks or own files decide what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftmix.config.read import read_config
from tests.tiny import SHORT, metrics

STOPPING = (
    "--objective",
    "NTP",
    "--training.max_steps",
    "8",
    "--training.warmup_ratio",
    "0",
    "--checkpoint.every",
    "0",
)
STOPPING += ("--training.learning_rate", "0.3", "--callbacks+", "EarlyStopping", "--callbacks.patience", "1")


def test_an_evaluation_that_decides_when_to_stop_is_an_input(tiny, tmp_path, sftmix):
    """Evaluate changes no training by itself, but EarlyStopping behind it sees what it measures."""
    words = {
        every: ["run", *tiny.options, "--callbacks", "Evaluate", "--callbacks.every", every, *STOPPING]
        for every in ("1", "4")
    }
    assert sftmix(*words["1"], "--out", str(tmp_path / "run")).code == 0
    stopped = metrics(tmp_path / "run")[-1]["step"]
    assert stopped < 8
    refused = sftmix(*words["4"], "--out", str(tmp_path / "run"))
    assert (refused.code, "callbacks" in refused.err) == (2, True), refused.err
    assert sftmix(*words["4"], "--out", str(tmp_path / "other")).code == 0
    assert metrics(tmp_path / "other")[-1]["step"] != stopped


def test_what_early_stopping_does_not_look_at_may_change(tiny, tmp_path, sftmix):
    words = [
        "run",
        *tiny.options,
        "--out",
        str(tmp_path / "run"),
        "--callbacks",
        "LossSpikeGuard",
        "--callbacks.factor",
    ]
    assert sftmix(*words, "90", "--callbacks+", "Evaluate", *STOPPING).code == 0
    assert sftmix(*words, "91", "--callbacks+", "Evaluate", *STOPPING).code == 0


def test_an_evaluation_that_decides_nothing_is_none(tiny, tmp_path, sftmix):
    words = ["run", *tiny.options, *SHORT, "--objective", "NTP", "--out", str(tmp_path / "run")]
    assert sftmix(*words, "--callbacks", "Evaluate", "--callbacks.every", "1").code == 0
    assert sftmix(*words, "--callbacks", "Evaluate", "--callbacks.every", "2").code == 0


def test_the_layout_of_the_reference_may_change_as_that_of_the_target(tiny, tmp_path, sftmix):
    words = ["reference", *tiny.options, *SHORT, "--out", str(tmp_path / "run")]
    assert sftmix(*words, "--reference.training.micro_batch_size", "2").code == 0
    assert sftmix(*words, "--reference.training.micro_batch_size", "4").code == 0
    refused = sftmix(*words, "--reference.training.learning_rate", "0.02")
    assert (refused.code, "training.learning_rate: 0.01 -> 0.02" in refused.err) == (2, True), refused.err


def test_a_template_in_the_home_directory_is_an_input(tiny, tmp_path, sftmix, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    template = Path(tmp_path / "mine.jinja")
    text = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}"
    text += "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    template.write_text(text)
    words = ["reference", *tiny.options, *SHORT, "--out", str(tmp_path / "run")]
    words += ["--reference.model.template", "~/mine.jinja"]
    assert sftmix(*words).code == 0
    template.write_text(text.replace("[", "<"))
    refused = sftmix(*words)
    assert (refused.code, "mine.jinja" in refused.err) == (2, True), refused.err


FAILING = """
from sftmix.components import Perplexity

class Failing(Perplexity):
    def estimate(self, dynamics):
        if len(dynamics.steps) == 2:  # the real ones; made-up ones have three checkpoints
            raise ValueError("not these")
        return super().estimate(dynamics)
"""


def test_a_confidence_that_failed_leaves_its_place_to_another(tiny, tmp_path, sftmix, monkeypatch):
    """The reference's dynamics stand in the same directory, and are not the confidence's."""
    (tmp_path / "failing_parts.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["confidence", *tiny.options, *SHORT, "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="not these"):
        sftmix(*words, "--confidence", "failing_parts.Failing")
    assert sftmix(*words, "--confidence", "LogPerplexity").code == 0
    assert type(read_config(tmp_path / "run" / "config.yaml").confidence).__name__ == "LogPerplexity"
    refused = sftmix(*words, "--confidence", "Perplexity")
    assert refused.code == 2
