"""What is measured around a training: against the exported models, and against counting by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.batches.order import epoch_units
from sftmix.common.files import read_json
from sftmix.common.tables import read_dynamics, read_eval, write_dynamics
from sftmix.common.world import World
from sftmix.data import load_data, make_encoder
from sftmix.measure.model import Measurement, best_evaluation, confidence_std, mixed_share, sample_rows
from sftmix.options import DataOptions
from sftmix.types import RowScores, TrainingDynamics
from tests.tiny import SHORT, metrics
from tests.toy import own_logits, own_nll


@pytest.fixture(scope="module")
def data(finished):
    encoder = make_encoder(AutoTokenizer.from_pretrained(finished.tiny.model), None)
    options = DataOptions(train=[str(finished.tiny.train)], eval=[str(finished.tiny.eval)])
    return load_data(options, encoder, max_length=128, seed=0, progress=False)


@pytest.mark.parametrize("arm", ["train", "baseline"])
def test_the_held_out_table_and_its_figures_are_those_of_the_exported_model(finished, data, arm):
    model = AutoModelForCausalLM.from_pretrained(finished.path / arm / "model").eval()
    ids, scores, _ = read_eval(finished.path / arm / "eval.parquet")
    assert ids == data.eval.ids
    logits, nll = own_logits(model, data.eval), own_nll(model, data.eval)
    assert scores.n_tokens.tolist() == [len(y) for _, y in logits]
    assert scores.n_correct.tolist() == [(z.argmax(axis=1) == y).sum() for z, y in logits]
    assert scores.nll_sum == pytest.approx([own.sum() for own in nll], rel=1e-5)
    summary = read_json(finished.path / "summary.json")
    found = summary if arm == "train" else summary["baseline"]
    assert found["eval_nll_after"] == scores.nll_sum.sum() / scores.n_tokens.sum()
    z, labels = (np.concatenate(parts) for parts in zip(*logits, strict=True))
    p = torch.from_numpy(z).softmax(-1).numpy()
    brier = ((p - np.eye(p.shape[1])[labels]) ** 2).sum(axis=1).mean()
    assert found["calibration"]["brier"] == pytest.approx(brier, rel=1e-5)
    curve = read_json(finished.path / arm / "calibration.json")["reliability"]
    assert sum(b["count"] for b in curve) == len(labels)


def test_the_spread_of_confidence_is_that_of_the_models(finished, data):
    """29 rows are fewer than the sample may hold: it is all of them, and both arms begin at the same base model."""
    summary = read_json(finished.path / "summary.json")
    spread = {}
    for name, path in (
        ("before", finished.tiny.model),
        ("after", finished.path / "train" / "model"),
        ("baseline", finished.path / "baseline" / "model"),
    ):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        mean = [nll.mean() for nll in own_nll(model, data.train)]
        spread[name] = np.std(np.exp(mean)), np.std(mean)
    ours, plain = summary["confidence_std"], summary["baseline"]["confidence_std"]
    assert ours["rows"] == plain["rows"] == 29
    for k, prefix in enumerate(("", "log_")):
        for found, after in ((ours, "after"), (plain, "baseline")):
            assert found[f"{prefix}before"] == pytest.approx(spread["before"][k], rel=1e-4)
            assert found[f"{prefix}after"] == pytest.approx(spread[after][k], rel=1e-4)
            assert found[f"{prefix}change"] == pytest.approx(spread[after][k] / spread["before"][k] - 1, rel=1e-3)
        against = spread["after"][k] / spread["baseline"][k] - 1
        assert ours[f"{prefix}vs_baseline"] == pytest.approx(against, rel=1e-3)
    assert not [k for k in plain if "baseline" in k]


def test_the_measurements_are_outputs_of_their_stage(finished):
    files = read_json(finished.path / "train" / "MANIFEST.json")["files"]
    assert {"eval.parquet", "calibration.json", "sample.parquet"} <= set(files)
    columns = pq.read_table(finished.path / "train" / "eval.parquet").schema
    assert columns.names == ["id", "nll_sum", "n_tokens", "n_correct", "brier_sum"]
    assert [str(t) for t in columns.types] == ["string", "double", "int64", "int64", "double"]


def test_the_base_model_is_measured_once_for_both_arms_and_after_them(finished, data):
    """Its figures are those of the model that was given, and no step waited for them."""
    assert sorted(read_json(finished.path / "base" / "MANIFEST.json")["files"]) == [
        "eval.parquet",
        "figures.json",
        "sample.parquet",
    ]
    model = AutoModelForCausalLM.from_pretrained(finished.tiny.model).eval()
    ids, scores, brier = read_eval(finished.path / "base" / "eval.parquet")
    assert (ids, brier) == (data.eval.ids, None)
    assert scores.nll_sum == pytest.approx([nll.sum() for nll in own_nll(model, data.eval)], rel=1e-5)
    before = read_json(finished.path / "summary.json")["eval_nll_before"]
    assert before == scores.nll_sum.sum() / scores.n_tokens.sum()
    assert before == read_json(finished.path / "base" / "figures.json")["eval_nll"]
    sample = read_dynamics(finished.path / "base" / "sample.parquet").of(data.train.ids)
    assert sample.steps.tolist() == [0]
    assert sample.nll_sum[:, 0] == pytest.approx([nll.sum() for nll in own_nll(model, data.train)], rel=1e-5)
    last = metrics(finished.path, "baseline")[-1]["time"]
    assert (finished.path / "base" / "inputs.json").stat().st_mtime > last
    status = read_json(finished.path / "STATUS.json")
    assert (status["stage"], status["step"], status["exit_code"]) == ("train", len(metrics(finished.path)), 0)
    assert status["doing"] == ""


def test_without_held_out_rows_there_is_no_calibration(tiny, tmp_path, sftmix):
    run = tmp_path / "run"
    words = list(tiny.options)
    at = words.index("--data.eval")
    del words[at : at + 2]
    assert sftmix("run", *words, *SHORT, "--objective", "NTP", "--out", str(run)).code == 0
    assert not (run / "train" / "eval.parquet").exists()
    summary = read_json(run / "summary.json")
    assert summary["calibration"] is None
    assert summary["eval_nll_best"] is None
    assert summary["confidence_std"]["rows"] == 29


# ------------------------------------------------------------------------------------------ by hand


def test_the_sample_depends_on_the_ids_only():
    ids = [f"row-{k}" for k in range(5000)]
    chosen = sample_rows(ids)
    assert len(chosen) == 250
    assert np.all(np.diff(chosen) > 0)
    order = np.random.default_rng(0).permutation(5000)
    again = sample_rows([ids[i] for i in order])
    assert {ids[order[row]] for row in again} == {ids[row] for row in chosen}
    assert [len(sample_rows(ids[:n])) for n in (3, 128, 2000)] == [3, 128, 128]
    assert len(sample_rows([str(k) for k in range(30_000)])) == 1000


def test_the_sample_keeps_its_ids_apart(tmp_path):
    """128 of 200 rows, whose NLL is their number: each is written beside its own id."""
    train = SimpleNamespace(ids=[f"example-{row}" for row in range(200)])

    def score(part) -> RowScores:
        return RowScores(part.rows.astype(float), np.full(len(part), 3), np.zeros(len(part), np.int64))

    data = SimpleNamespace(train=train, eval=None)
    assert Measurement(tmp_path, World(), data).base(score) == (["sample.parquet"], {})  # type: ignore[arg-type]
    found = read_dynamics(tmp_path / "sample.parquet")
    assert len(found.ids) == 128
    assert found.nll_sum[:, 0].tolist() == [float(i.removeprefix("example-")) for i in found.ids]
    assert found.nll_sum[:, 0].tolist() != list(range(128))


def test_the_best_evaluation_is_the_smallest_one_the_last_included():
    lines = [
        {"step": 1, "epoch": 0, "eval_nll": 4.0},
        {"step": 2, "epoch": 0},
        {"step": 3, "epoch": 1, "eval_nll": 3.0},
        {"step": 4, "epoch": 1, "eval_nll": None},
        {"step": 5, "epoch": 2, "eval_nll": 3.5},
    ]
    best = {"eval_nll_best": 3.0, "eval_nll_best_step": 3, "eval_nll_best_epoch": 1}
    assert best_evaluation(lines, 3.5) == best
    assert best_evaluation(lines, 2.5) == {"eval_nll_best": 2.5, "eval_nll_best_step": 5, "eval_nll_best_epoch": 2}
    assert best_evaluation([{"step": 7, "epoch": 0}], 9.0)["eval_nll_best_step"] == 7
    assert best_evaluation(lines, None) == {}


def test_the_share_of_mixed_tokens_counts_each_token_once():
    """Pairs (0, 1), (2, 3) and row 0 a second time with 4, two epochs; the first step of the second mixes nothing."""
    counts = np.array([10, 4, 7, 7, 8])
    pairs = np.array([[0, 1], [2, 3], [0, 4]])
    steps = [[unit] for epoch in (0, 1) for unit in epoch_units(5, pairs, epoch=epoch, seed=0)]
    assert [len(s[0]) for s in steps] == [2] * 6

    def share(mixed) -> float:
        lines = [{"step": step, "mixup_tokens": step - 1 in mixed} for step in range(1, 7)]
        return mixed_share(lambda step: steps[step], lines, counts)

    seen = 4 + 4 + 7 + 7 + (8 - 4) + 8  # of row 0: the first 4 with row 1, the next 4 with row 4
    assert share(range(6)) == pytest.approx(seen / 36)
    assert share(range(4, 6)) == pytest.approx((7 + 7 + 8 + 8) / 72)
    assert share([]) == 0.0


def test_the_spread_of_an_overflowing_perplexity_is_left_out(tmp_path):
    for name, step, nll in (("base", 0, [1.0, 2.0]), ("train", 5, [800.0, 1.0])):
        sums, one = np.array(nll)[:, None], np.array([1, 1])
        dynamics = TrainingDynamics(["a", "b"], np.array([step]), sums, one, np.zeros((2, 1), np.int64))
        write_dynamics(tmp_path / name / "sample.parquet", dynamics)
    unknown = confidence_std(tmp_path / "not there", tmp_path / "train")
    assert unknown["log_before"] is unknown["log_change"] is None
    assert unknown["log_after"] == pytest.approx(399.5)
    found = confidence_std(tmp_path / "base", tmp_path / "train")
    assert found["before"] == pytest.approx((np.exp(2) - np.exp(1)) / 2)
    assert found["after"] is found["change"] is None
    assert found["log_after"] == pytest.approx(399.5)
    assert found["log_change"] == pytest.approx(798)
    json.dumps(found, allow_nan=False)
