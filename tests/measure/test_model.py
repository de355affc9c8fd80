"""What is measured around a training: against the exported models, and against counting by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.batches.order import epoch_units
from sftmix.data import encode_dataset, prepare
from sftmix.disk.files import read_json
from sftmix.disk.tables import read_columns, read_dynamics
from sftmix.measure.model import best_evaluation, change, finite, measure, mixed_share, sample_rows
from sftmix.options import DataOptions
from sftmix.ranks.world import World
from sftmix.training.scoring import Scorer
from sftmix.types import RowLosses
from tests.text.small_tokenizers import make_encoder
from tests.tiny import SHORT, metrics
from tests.toy import own_logits, own_nll


@pytest.fixture(scope="module")
def data(finished):
    encoder = make_encoder(AutoTokenizer.from_pretrained(finished.tiny.model), None)
    options = DataOptions(train=[str(finished.tiny.train)], eval=[str(finished.tiny.eval)])
    return encode_dataset(prepare(options, 0), encoder, max_length=128)


@pytest.mark.parametrize("stage", ["base", "train", "baseline"])
def test_the_held_out_table_and_its_figures_are_those_of_the_model(finished, data, stage):
    path = finished.tiny.model if stage == "base" else finished.path / stage / "model"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    table = read_columns(finished.path / stage / "eval.parquet", "id", "nll_sum", "n_tokens", "n_correct")
    assert table["id"] == data.eval.ids
    scores = RowLosses(table["nll_sum"], table["n_tokens"], table["n_correct"])
    logits, nll = own_logits(model, data.eval), own_nll(model, data.eval)
    assert scores.n_tokens.tolist() == [len(y) for _, y in logits]
    assert scores.n_correct.tolist() == [(z.argmax(axis=1) == y).sum() for z, y in logits]
    assert scores.nll_sum == pytest.approx([own.sum() for own in nll], rel=1e-5)
    summary = read_json(finished.path / "summary.json")
    found = summary["baseline"] if stage == "baseline" else summary
    told = found["eval_nll_before" if stage == "base" else "eval_nll_after"]
    assert told == scores.nll_sum.sum() / scores.n_tokens.sum()
    if stage != "base":
        curve = read_json(finished.path / stage / "calibration.json")["reliability"]
        assert sum(b["count"] for b in curve) == found["calibration"]["tokens"] == scores.n_tokens.sum()


def test_the_spread_of_confidence_is_that_of_the_models(finished, data):
    """29 rows are fewer than the sample may hold: it is all of them, and both arms begin at the same base model."""
    summary, run = read_json(finished.path / "summary.json"), finished.path
    means = [
        np.array([nll.mean() for nll in own_nll(AutoModelForCausalLM.from_pretrained(path).eval(), data.train)])
        for path in (finished.tiny.model, run / "train" / "model", run / "baseline" / "model")
    ]
    ours, plain = summary["confidence_std"], summary["baseline"]["confidence_std"]
    assert ours["rows"] == plain["rows"] == 29
    for prefix, of in (("", np.exp), ("log_", np.array)):
        before, after, baseline = (of(mean).std() for mean in means)
        assert [ours[f"{prefix}before"], plain[f"{prefix}before"]] == pytest.approx([before, before], rel=1e-4)
        assert [ours[f"{prefix}after"], plain[f"{prefix}after"]] == pytest.approx([after, baseline], rel=1e-4)
        assert ours[f"{prefix}change"] == pytest.approx(after / before - 1, rel=1e-3)
        assert ours[f"{prefix}vs_baseline"] == pytest.approx(after / baseline - 1, rel=1e-3)


def test_no_step_waits_for_the_measurement_of_the_base_model(finished):
    assert (finished.path / "base" / "inputs.json").stat().st_mtime > metrics(finished.path, "baseline")[-1]["time"]


def test_without_held_out_rows_there_is_no_calibration(tiny, tmp_path, sftmix):
    run = tmp_path / "run"
    words = [word for word in tiny.options if word not in ("--data.eval", str(tiny.eval))]
    assert sftmix("run", *words, *SHORT, "--objective", "NTP", "--out", str(run)).code == 0
    assert not (run / "train" / "eval.parquet").exists()
    summary = read_json(run / "summary.json")
    assert (summary["calibration"], summary["eval_nll_best"]) == (None, None)


# ------------------------------------------------------------------------------------------ by hand


def test_the_sample_depends_on_the_ids_only():
    ids = [f"row-{k}" for k in range(5000)]
    chosen = sample_rows(ids)
    assert len(chosen) == 250
    assert np.all(np.diff(chosen) > 0)
    assert {4999 - row for row in sample_rows(ids[::-1])} == {*chosen}
    assert [len(sample_rows(ids[:n])) for n in (3, 128, 2000)] == [3, 128, 128]
    assert len(sample_rows([str(k) for k in range(30_000)])) == 1000


def test_the_sample_keeps_its_ids_apart(tmp_path):
    """128 of 200 rows, whose NLL is their number: each is written beside its own id."""
    train = SimpleNamespace(ids=[f"example-{row}" for row in range(200)])

    class Numbers(Scorer):
        def __call__(self, module, data) -> RowLosses:
            return RowLosses(data.rows.astype(float), np.full(len(data), 3), np.zeros(len(data), np.int64))

    data, scorer = SimpleNamespace(train=train, eval=None), Numbers(world=World())
    assert measure(tmp_path, data, scorer, None) == (["sample.parquet"], {})  # type: ignore[arg-type]
    found = read_dynamics(tmp_path / "sample.parquet")
    assert len(found.ids) == 128
    assert found.nll_sum[:, 0].tolist() == [float(i.removeprefix("example-")) for i in found.ids]


def test_the_best_evaluation_is_the_smallest_one_the_last_included():
    lines = [
        {"step": 2, "epoch": 0},
        {"step": 3, "epoch": 1, "eval_nll": 3.0},
        {"step": 4, "epoch": 1, "eval_nll": None},
        {"step": 5, "epoch": 2, "eval_nll": 3.5},
    ]
    assert [*best_evaluation(lines, 3.5).values()] == [3.0, 3, 1]
    assert [*best_evaluation(lines, 2.5).values()] == [2.5, 5, 2]
    lines[0]["start_eval_nll"] = 2.0
    assert [*best_evaluation(lines, 3.5).values()] == [*best_evaluation(lines[:1], 3.5).values()] == [2.0, 0, 0]
    assert [*best_evaluation([], 3.5).values()] == [3.5, 0, 0]
    assert best_evaluation(lines, None) == {}


def test_the_share_of_mixed_tokens_counts_each_token_once():
    """Pairs (0, 1), (2, 3) and row 0 a second time with 4, two epochs; the first step of the second mixes nothing."""
    counts = np.array([10, 4, 7, 7, 8])
    pairs = np.array([[0, 1], [2, 3], [0, 4]])
    steps = [[unit] for epoch in (0, 1) for unit in epoch_units(5, pairs, epoch=epoch, seed=0)]
    assert [len(s[0]) for s in steps] == [2] * 6

    def share(mixed) -> float:
        lines = [{"step": s, "epoch": (s - 1) // 3, "mixup_tokens": s - 1 in mixed} for s in range(1, 7)]
        one, other = (mixed_share(steps.__getitem__, order, counts) for order in (lines, lines[::-1]))
        assert one == other
        return one

    seen = 4 + 4 + 7 + 7 + (8 - 4) + 8  # of row 0: the first 4 with row 1, the next 4 with row 4
    assert share(range(6)) == pytest.approx(seen / 36)
    assert share(range(4, 6)) == pytest.approx((7 + 7 + 8 + 8) / 72)
    assert share([]) == 0.0


def test_a_figure_that_is_not_finite_is_left_out():
    assert finite(np.std, np.array([1.0, 2.0])) == 0.5
    assert finite(lambda nll: np.exp(nll).std(), np.array([800.0, 1.0])) is None
    assert finite(np.std, np.array([])) is None
    assert [change(2.0, 3.0), change(None, 1.0), change(1.0, None)] == [0.5, None, None]
