"""What callbacks find of the delivered weights, and say of the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.components import Callback, Delivered, StageState
from sftmix.data import encode_dataset, prepare
from sftmix.disk.files import read_json
from sftmix.disk.tables import read_table
from sftmix.measure.delivered import deliver
from sftmix.options import DataOptions
from sftmix.training.module import TrainingModule
from sftmix.types import RowLosses
from sftmix.words.errors import ContractError
from tests.test_docs import ROOT, blocks
from tests.text.small_tokenizers import make_encoder
from tests.tiny import SHORT
from tests.toy import own_logits, toy_model, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (60, 40), (1, 1)])
SCORES = RowLosses(np.zeros(3), np.ones(3, int), np.ones(3, int))


class Finds(Callback):
    """What it is given, as the answer."""

    def __init__(self, *, found: object = None):
        self.found = found

    def on_delivered(self, state: StageState) -> Delivered:
        return self.found


class Longest(Callback):
    """The largest logit of each held-out row, and how far all of its tokens' logits reach."""

    def on_delivered(self, state: StageState) -> Delivered:
        top, spread = state.measure(_reach)
        assert state.evaluate()["eval_nll"] > 0
        ids = dict(zip(state.held_out, ([float(x) for x in row] for row in top), strict=True))
        return Delivered({"spread": float(sum(spread))}, {"top.json": ids})


def _reach(hidden, head, batch):
    logits = head.logits(hidden)
    return [logits.amax(1)], [logits.amax(1) - logits.amin(1)]


def found_by(place, *callbacks) -> Delivered:
    stage = toy_stage(place, [[]], eval_data=DATA, data=toy_rows([]), callbacks=callbacks)
    return deliver(stage, TrainingModule(toy_model()), figures={"steps": 1, "own": 2.0}, last={"loss": 3.0})


def test_a_callback_measures_rows_in_their_order(tmp_path):
    found = found_by(tmp_path, Longest(), Finds(found=Delivered({"mine": {"a": [1]}}, scores=SCORES)))
    logits = [z for z, _ in own_logits(toy_model().eval(), DATA)]
    top = read_json(tmp_path / "top.json")
    assert [*top] == DATA.ids
    for row, z in zip(top.values(), logits, strict=True):
        assert row == pytest.approx(z.max(1), rel=1e-5)
    assert found.figures["spread"] == pytest.approx(sum((z.max(1) - z.min(1)).sum() for z in logits), rel=1e-5)
    assert found.figures["mine"] == {"a": [1]}
    assert found.scores is SCORES


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([{"mine": 1}], "returned dict; allowed: .*Delivered"),
        ([Delivered({"own": 1})], "own from on_delivered"),
        ([Delivered({"eval_nll": 1})], "eval_nll from on_delivered"),
        ([Delivered({"mine": 1}), Delivered({"mine": 1})], "mine from on_delivered"),
        ([Delivered(files={"a.json": 1}), Delivered(files={"a.json": 1})], "a.json from on_delivered"),
        ([Delivered(files={"figures.json": 1})], "figures.json from on_delivered"),
        ([Delivered(files={"../a.json": 1})], "the file '../a.json' from on_delivered"),
        ([Delivered({"mine": {1}})], r"mine \{1\} from on_delivered\(\); allowed: values of JSON"),
        (
            [Delivered(scores=RowLosses(np.zeros(2), np.ones(2, int), np.ones(2, int)))],
            r"scores of the shapes \[\(2,\)",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(tmp_path, answers, told):
    with pytest.raises(ContractError, match=told):
        found_by(tmp_path, *[Finds(found=answer) for answer in answers])
    assert not [*tmp_path.glob("*.json")]


def test_numbers_of_arrays_and_tensors_are_values_of_json(tmp_path):
    given = {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": [np.arange(2)], "d": {"e": torch.ones(1)}}
    found = found_by(tmp_path, Finds(found=Delivered(given, {"all.json": given})))
    plain = {"a": 0.5, "b": 2.0, "c": [[0, 1]], "d": {"e": [1.0]}}
    assert found.figures == read_json(tmp_path / "all.json") == plain


def test_a_run_without_the_measurements_says_what_it_lacks(tiny, finished, tmp_path, sftmix):
    words = ["run", *tiny.options, *SHORT, "--objective", "NTP", "--callbacks", "Evaluate", "--out", str(tmp_path)]
    assert sftmix(*words).code == 0
    summary = read_json(tmp_path / "summary.json")
    assert (summary["calibration"], summary["remarks"]) == (None, None)
    assert summary["not_in_callbacks"] == ["Calibration", "Remarks"]
    assert not (tmp_path / "train" / "calibration.json").exists()
    assert "brier_sum" not in read_table(tmp_path / "train" / "eval.parquet", ["id"]).column_names
    assert sftmix("verify", str(tmp_path), "--from", "0").code == 0
    assert "not_in_callbacks" not in read_json(finished.path / "summary.json")


class Silent(Callback):
    """Remarks on nothing."""

    def on_summary(self, stages):
        return []


def test_a_callback_that_remarks_on_nothing_is_not_the_one_that_is_missing(tiny, tmp_path, sftmix):
    words = ["run", *tiny.options, *SHORT, "--objective", "NTP", "--callbacks", f"{__name__}.Silent"]
    assert sftmix(*words, "--out", str(tmp_path / "run")).code == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["remarks"] == []
    assert summary["not_in_callbacks"] == ["Calibration", "Remarks"]


def test_the_callback_of_the_page_measures_and_remarks(tiny, tmp_path, sftmix, monkeypatch):
    """Beside Calibration, whose scores stay those of eval.parquet."""
    monkeypatch.chdir(tmp_path)
    (code,) = (text for text in blocks(ROOT / "docs" / "components.md", "python") if text.startswith("# my_top5.py"))
    Path("my_top5.py").write_text(code)
    words = ["run", *tiny.options, *SHORT, "--objective", "NTP", "--callbacks+", "my_top5.TopFive", "--out", "run"]
    assert sftmix(*words).code == 0
    encoder = make_encoder(AutoTokenizer.from_pretrained(tiny.model), None)
    options = DataOptions(train=[str(tiny.train)], eval=[str(tiny.eval)])
    rows = encode_dataset(prepare(options, 0), encoder, max_length=128).eval
    model = AutoModelForCausalLM.from_pretrained("run/train/model").eval()
    hits = [(z.argsort(1)[:, -5:] == y[:, None]).any(1).sum() for z, y in own_logits(model, rows)]
    assert read_json(Path("run/train/top_five.json")) == dict(zip(rows.ids, hits, strict=True))
    summary = read_json(Path("run/summary.json"))
    assert f"{sum(hits)} held-out tokens were among the five most likely." in summary["remarks"]
    assert read_json(Path("run/train/figures.json"))["top_five"] == sum(hits)
    assert summary["calibration"]["nll"] == summary["eval_nll_after"]
    assert "top_five.json" in read_json(Path("run/train/MANIFEST.json"))["files"]
    certificate = sftmix("verify", "run", "--from", "0", "--trust")
    assert (certificate.code, "train/top_five.json" in certificate.out) == (0, True)
