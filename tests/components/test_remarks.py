"""Remarks on a run that ended worse than it began, and the weights of its best evaluation."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from sftmix.components.others.remarks import remarks
from sftmix.data import encode_dataset, prepare
from sftmix.disk.files import read_json
from sftmix.measure.model import ends_of_loss
from sftmix.model.load import load_tokenizer
from sftmix.options import DataOptions
from sftmix.text.encoder import encoder_for
from tests.tiny import SHORT, in_this_process, metrics
from tests.toy import own_nll

SINGLE = ("--objective", "NTP", "--training.warmup_ratio", "0", "--checkpoint.every", "0")
"""Options of a training without pairs, which needs no reference."""


def test_a_reference_that_diverged(tiny, tmp_path, sftmix):
    """Its own learning rate is too large, the target's is not; the reference alone is told of, too."""
    out = tmp_path / "run"
    words = [*tiny.options, *SHORT, "--reference.training.learning_rate", "5", "--out", str(out)]
    assert sftmix("reference", *words).code == 0
    (remark,) = read_json(out / "summary.json")["remarks"]
    assert remark.startswith("The training of the reference diverged: its loss was ")


@pytest.fixture(scope="module")
def worse(tmp_path_factory, finished) -> Path:
    """A run at a learning rate under which the first evaluation is the best."""
    place = tmp_path_factory.mktemp("worse")
    words = ["run", *finished.tiny.options, *SINGLE, "--training.learning_rate", "0.1", "--training.max_steps", "6"]
    words += ["--callbacks.every", "2", "--checkpoint.keep_best", "true", "--out", "run"]
    assert in_this_process(*words, cwd=place).returncode == 0
    return place / "run"


@pytest.mark.slow
def test_a_run_that_ends_worse_says_so_and_where_it_was_best(worse):
    summary = read_json(worse / "summary.json")
    evaluations = {m["step"]: m["eval_nll"] for m in metrics(worse) if "eval_nll" in m}
    best = min(evaluations, key=evaluations.__getitem__)
    assert best < 6
    assert summary["eval_nll_after"] > summary["eval_nll_before"]
    first, second = summary["remarks"]
    assert first.startswith("The trained model is worse than the base model on the held-out rows")
    assert f"step {best} of 6: held-out NLL {evaluations[best]:.4f}" in second


def test_export_best_writes_the_weights_of_the_best_evaluation(worse, finished, tmp_path, sftmix):
    words = ("export", str(worse), "--best", "--to", str(tmp_path / "best"))
    both = sftmix(*words, "--step", "1")
    assert (both.code, "--best and --step 1" in both.err) == (2, True)
    assert sftmix(*words).code == 0
    summary, options = read_json(worse / "summary.json"), DataOptions(train=[str(finished.tiny.eval)])
    data = encode_dataset(
        prepare(options, 0), encoder_for(load_tokenizer(finished.tiny.model), options), max_length=128
    ).train
    for path, when in ((tmp_path / "best", "best"), (worse / "train" / "model", "after")):
        nll = np.concatenate(own_nll(AutoModelForCausalLM.from_pretrained(path).eval(), data))
        assert nll.mean() == pytest.approx(summary[f"eval_nll_{when}"], rel=1e-5)
    assert summary["eval_nll_best"] < 0.99 * summary["eval_nll_after"]


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"eval_nll": 4.0075, "eval_nll_best": 3.355}, ["The best evaluation was at step 6"]),
        ({"eval_nll": 4.007 + 1e-9, "eval_nll_best": 4.0, "skipped": 12}, ["12 of 12 steps were skipped"]),
        ({"eval_nll": 4.0075, "eval_nll_best": 4.0074, "skipped": 1}, ["1 of 12 steps", "The training hardly"]),
        ({"eval_nll": 5.008, "eval_nll_best": 3.355}, ["The trained model is worse", "The best evaluation"]),
        ({"eval_nll": 3.0, "eval_nll_best": 3.0}, []),
        ({}, []),
    ],
)
def test_remarks_do_not_contradict_each_other(figures, expected):
    train = {"steps": 12, "skipped": 0, "stopped_by": "", "eval_nll_best_step": 6, **figures}
    stages = {"base": {"eval_nll": 4.007}, "train": train}
    sentences = list(remarks(stages))
    assert len(sentences) == len(expected)
    assert all(sentence.startswith(begin) for sentence, begin in zip(sentences, expected, strict=True))


@pytest.mark.parametrize(
    ("medians", "said"), [((-2.0, -3.5), 0), ((-3.5, -2.0), 1), ((-1, -3, -2), 1), ((-2, -2), 0), ((-2, None), 0)]
)
def test_groups_out_of_order_are_remarked(medians, said):
    groups = {str(number): {"examples": 4, "confidence_median": median} for number, median in enumerate(medians)}
    found = list(remarks({"split": {"confidence": {**groups, "unpaired": {"examples": 1}}}}))
    assert [line.partition(" (")[0] for line in found] == [
        "The groups of the split are not in the order of their confidence"
    ] * said


def test_a_short_last_step_is_no_divergence(tmp_path):
    """The last step of each epoch holds one response of two tokens, with a loss of its own."""
    losses, tokens = [4.4, 4.4, *[4.4, 4.4, 9.7] * 2], [900, 900, *[900, 900, 2] * 2]
    steps = pd.DataFrame({"step": range(1, 9), "loss": losses, "ntp_tokens": tokens})
    steps.to_json(tmp_path / "metrics.jsonl", orient="records", lines=True)
    found = ends_of_loss(tmp_path)
    assert found["loss_first"] == pytest.approx(4.4)
    assert found["loss_last"] == pytest.approx((4.4 * 1800 + 9.7 * 4) / 1804)


@pytest.mark.parametrize(("steps", "size"), [(100, 10), (40, 8), (10, 5)])
def test_the_ends_of_a_loss_are_a_tenth_of_all_steps_or_8_or_half(steps, size, tmp_path):
    log = pd.DataFrame({"step": range(1, steps + 1), "loss": [float(k) for k in range(steps)], "ntp_tokens": 7})
    log.to_json(tmp_path / "metrics.jsonl", orient="records", lines=True)
    middle = (size - 1) / 2
    assert ends_of_loss(tmp_path) == pytest.approx({"loss_first": middle, "loss_last": steps - 1 - middle})
