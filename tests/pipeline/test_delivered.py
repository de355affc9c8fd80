"""What is said of a model is measured on the weights that are delivered: those of train/model, rounded as they are."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sftmix.data import encode_dataset, prepare
from sftmix.disk.files import read_json
from sftmix.model.load import load_tokenizer
from sftmix.model.rounding import stochastically_rounded
from sftmix.options import DataOptions
from sftmix.text.encoder import encoder_for
from tests.fast import some_fast
from tests.tiny import Tiny, in_this_process, weights
from tests.toy import own_nll

SEED = 7
WORDS = ("--seed", str(SEED), "--objective", "NTP", "--pairing", "null", "--training.learning_rate", "2e-6")
WORDS += ("--training.warmup_ratio", "0", "--training.schedule", "constant", "--checkpoint.every", "6")


def in_half(tiny: Tiny, place: Path, dtype: torch.dtype = torch.bfloat16) -> Tiny:
    """The tiny model stored in half precision."""
    half = Tiny(place / "half", tiny.train, tiny.eval)
    shutil.copytree(tiny.model, half.model)
    AutoModelForCausalLM.from_pretrained(tiny.model, dtype=dtype).save_pretrained(half.model)
    return half


def nll_of(model: Path, tiny: Tiny) -> float:
    options = DataOptions(train=[str(tiny.eval)])
    data = encode_dataset(prepare(options, 0), encoder_for(load_tokenizer(tiny.model), options), max_length=128).train
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return float(np.concatenate(own_nll(loaded, data)).mean())


@pytest.fixture(scope="module")
def half(tmp_path_factory, plain) -> Tiny:
    return in_half(plain, tmp_path_factory.mktemp("half"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, half):
    """rounding -> a run of twelve small steps with its baseline."""
    place = tmp_path_factory.mktemp("runs")
    for rounding in ("stochastic", "nearest"):
        words = (*WORDS, "--with_baseline", "--checkpoint.rounding", rounding, "--out", rounding)
        done = in_this_process("run", *half.bare, *words, cwd=place)
        assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("rounding", some_fast(["stochastic", "nearest"], every=2))
def test_figures_are_those_of_the_delivered_weights(runs, half, rounding):
    summary, model = read_json(runs / rounding / "summary.json"), runs / rounding / "train" / "model"
    delivered = nll_of(model, half)
    assert summary["eval_nll_after"] == pytest.approx(delivered, rel=1e-6)
    assert summary["calibration"]["nll"] == summary["eval_nll_after"]
    assert summary["eval_nll_before"] == pytest.approx(nll_of(half.model, half), rel=1e-6)
    assert summary["baseline"]["eval_nll_after"] == pytest.approx(delivered, rel=1e-6)  # the same training
    assert f"| {delivered:.4f} |" in (model / "README.md").read_text()
    assert read_json(model / "config.json")["dtype"] == "bfloat16"


def test_stochastic_rounding_keeps_a_training_that_nearest_loses_and_a_line_says_so(runs, half):
    kept, lost = (read_json(runs / name / "summary.json") for name in ("stochastic", "nearest"))
    before, trained = kept["eval_nll_before"], kept["eval_nll_as_trained"]
    assert (lost["eval_nll_before"], lost["eval_nll_as_trained"]) == (before, trained)
    gain = before - trained
    assert gain > 2e-4
    assert abs(kept["eval_nll_after"] - trained) < 0.1 * gain
    assert lost["eval_nll_after"] - trained > 0.5 * gain
    (line,) = (remark for remark in lost["remarks"] if remark.startswith("Rounding"))
    assert f"from {trained:.4f} to {lost['eval_nll_after']:.4f} ({before:.4f} before" in line
    assert not [remark for remark in kept["remarks"] if remark.startswith("Rounding")]
    assert f"rounded from: {trained:.4f}" in (runs / "nearest/train/model/README.md").read_text()


AT_THE_START = """
from sftmix.components import Callback, CallbackResult, Need

class EvaluateAtStart(Callback):
    gives = frozenset({Need.EVALUATIONS})
    def on_stage_start(self, state):
        return CallbackResult(state.evaluate()) if state.evaluate else None
"""


@pytest.mark.slow
def test_an_evaluation_before_the_first_step_is_not_of_the_trained_weights(half, tmp_path, sftmix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("at_start.py").write_text(AT_THE_START)
    evaluated, found = ("--callbacks", "at_start.EvaluateAtStart"), {}
    for rate in ("1e-3", "1"):  # better, and worse
        for name, more in (("plain", ()), ("evaluated", evaluated)):
            one_step = ("--training.max_steps", "1", "--training.learning_rate", rate, "--out", f"{name}-{rate}")
            assert sftmix("run", *half.bare, *WORDS, *one_step, *more).code == 0
            found[name] = read_json(Path(f"{name}-{rate}", "summary.json"))
        plain, evaluated_too = found.values()
        before, trained = plain["eval_nll_before"], plain["eval_nll_as_trained"]
        assert (evaluated_too["eval_nll_as_trained"], trained < before) == (trained, rate == "1e-3")
        best = (trained, 1) if rate == "1e-3" else (before, 0)
        assert (evaluated_too["eval_nll_best"], evaluated_too["eval_nll_best_step"]) == pytest.approx(best)
        assert sftmix("verify", f"evaluated-{rate}", "--trust").code == 0


def test_the_delivered_weights_are_those_of_the_last_checkpoint_rounded(runs, half, sftmix, tmp_path):
    run, delivered = runs / "stochastic", weights(runs / "stochastic")
    assert sftmix("export", str(run), "--to", str(tmp_path / "whole"), "--dtype", "float32").code == 0
    trained = load_file(tmp_path / "whole/model.safetensors")
    for name, x in trained.items():
        assert torch.equal(delivered[name], stochastically_rounded(x, torch.bfloat16, seed=SEED, name=name))
    assert nll_of(tmp_path / "whole", half) == pytest.approx(
        read_json(run / "summary.json")["eval_nll_as_trained"], rel=1e-6
    )
    assert "Nothing was measured" in (tmp_path / "whole/README.md").read_text()
    again = sftmix("export", str(run), "--to", str(tmp_path / "again"))
    assert again.code == 0
    exported = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(exported[name], x) for name, x in delivered.items())
    assert (tmp_path / "again/README.md").read_text() == (run / "train/model/README.md").read_text()
    step = sftmix("export", str(run), "--to", str(tmp_path / "step"), "--step", "6")
    assert "no figures" in step.err
    assert "Nothing was measured" in (tmp_path / "step/README.md").read_text()


def test_a_run_that_is_rounded_in_another_way_is_refused(runs, half, tmp_path, sftmix):
    shutil.copytree(runs / "nearest", tmp_path / "run")
    words = ("run", *half.bare, *WORDS, "--with_baseline", "--out", str(tmp_path / "run"))
    assert sftmix(*words, "--checkpoint.rounding", "nearest").code == 0
    done = sftmix(*words)
    assert (done.code, "rounded in another way (checkpoint.rounding)" in done.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_the_run_is_verified(runs, rounding, sftmix):
    done = sftmix("verify", str(runs / rounding))
    assert done.code == 0, done.out
    assert done.out.splitlines()[-1].endswith("bit for bit")


@pytest.mark.slow
def test_adapters_stay_as_they_are_and_a_merged_model_is_rounded_without_a_figure(half, tmp_path, sftmix):
    words = ("run", *half.bare, *WORDS, "--model.lora.r", "4", "--out", str(tmp_path / "run"))
    assert sftmix(*words).code == 0
    summary = read_json(tmp_path / "run/summary.json")
    assert summary["eval_nll_as_trained"] is None  # as delivered
    assert read_json(tmp_path / "run/train/inputs.json")["rounding"] == "nearest"  # float32 is written as it is
    models = {}
    for name, more in (("merged", ()), ("whole", ("--dtype", "float32"))):
        done = sftmix("export", str(tmp_path / "run"), "--merge", *more, "--to", str(tmp_path / name))
        assert (done.code, "no figures" in done.err) == (0, True)
        assert f"{summary['eval_nll_after']:.4f}" not in (tmp_path / name / "README.md").read_text()
        models[name] = load_file(tmp_path / name / "model.safetensors")
    base = load_file(half.model / "model.safetensors")
    moved = 0
    for name, x in models["whole"].items():
        assert torch.equal(models["merged"][name], stochastically_rounded(x, torch.bfloat16, seed=SEED, name=name))
        if "proj" not in name:
            assert torch.equal(models["merged"][name], base[name])
        moved += int((models["merged"][name] != base[name]).sum())
    assert moved


def test_a_weight_without_room_in_float16_is_refused_before_any_step(tiny, tmp_path, sftmix):
    name = "model.layers.1.self_attn.k_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    model.get_parameter(name).data.view(-1)[5] = -1e5
    model.save_pretrained(tiny.model)
    run = tmp_path / "run"
    done = sftmix("run", *tiny.bare, *WORDS, "--model.dtype", "float16", "--out", str(run))
    assert (done.code, f"{name} has the value -100000" in done.err) == (2, True)
    assert not (run / "train/metrics.jsonl").exists()
    assert sftmix("run", *tiny.bare, *WORDS, "--model.dtype", "float32", "--out", str(tmp_path / "b")).code == 0
    done = sftmix("export", str(tmp_path / "b"), "--dtype", "float16", "--to", str(tmp_path / "to"))
    assert (done.code, "Choose bfloat16 or float32" in done.err, (tmp_path / "to").exists()) == (2, True, False)
