"""The stages of a run: what is reused, what is refused and by which name, what is not run at all, what is exported.

Everything goes through the command line, in this process; the fixture `finished` is one whole run of it.
"""

import signal
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.batches.order import TrainingOrder
from sftmix.components import NTP, Callback, CallbackResult, Median, RandomPairs, RandomSplit
from sftmix.components.contracts import MEASURED, OWN_OF_STAGE, OWN_OF_STEP
from sftmix.disk.files import read_json
from sftmix.disk.tables import read_split
from sftmix.model.paths import PICKLES
from sftmix.options import TrainingOptions
from sftmix.pipeline.lock import Hold
from sftmix.pipeline.recipe import run
from sftmix.ranks.rng import stable_hash
from sftmix.training.signals import StopSignal
from sftmix.types import Scores
from sftmix.words.errors import ConfigError
from tests.configs import read_config
from tests.tiny import SHORT, groups, metrics, status, table, weights

# ---------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("stage", ["train", "baseline"])
def test_no_figure_of_a_stage_has_a_name_that_a_callback_may_take(finished, stage):
    figures = read_json(finished.path / stage / "figures.json")
    assert figures.keys() - (OWN_OF_STAGE | MEASURED) == set()


def test_a_run_directory_holds_what_is_documented(finished):
    run = finished.path
    assert list(table(run / "split" / "split.parquet")) == ["id", "group"]
    dynamics = table(run / "confidence" / "dynamics.parquet")
    assert list(dynamics) == ["id", "checkpoint", "step", "nll_sum", "n_tokens", "n_correct", "token_nll"]
    assert list(table(run / "confidence" / "confidence.parquet")) == ["id", "confidence", "variability"]
    assert [m["step"] for m in metrics(run)] == list(range(1, 13))
    evaluated = {"eval_nll", "eval_accuracy", "eval_exact_match"}
    assert all(m.keys() - evaluated == OWN_OF_STEP for m in metrics(run)), "the table of names is what is written"
    ended = status(run)
    assert (ended["exit_code"], ended["step"], ended["total_steps"]) == (0, 12, 12)
    assert read_config(run / "config.yaml").as_dict()["out"] == str(run)
    assert not [file for file in run.rglob("*") if file.suffix in PICKLES or file.name.startswith(".tmp-")]


def test_confidence_and_split_are_the_papers_formula(finished):
    """Conf = -mean over checkpoints of exp(NLL / tokens); halves at the median, the odd one out is the median."""
    dynamics = pq.read_table(finished.path / "confidence" / "dynamics.parquet").to_pandas()
    expected = -np.exp(dynamics.nll_sum / dynamics.n_tokens).groupby(dynamics.id).mean()
    confidence = pq.read_table(finished.path / "confidence" / "confidence.parquet").to_pandas().set_index("id")
    np.testing.assert_allclose(confidence.confidence, expected[confidence.index], rtol=1e-12)
    ranked = list(confidence.confidence.sort_values(ascending=False).index)
    split = groups(finished.path)
    assert {split[i] for i in ranked[:14]} == {"confident"}
    assert split[ranked[14]] == "unpaired"
    assert {split[i] for i in ranked[15:]} == {"unconfident"}
    sums = dynamics.token_nll.map(lambda t: float(np.sum(t, dtype=np.float64)))
    np.testing.assert_allclose(sums, dynamics.nll_sum, rtol=2**-11)  # the rounding of float16, in which they are kept


def test_every_epoch_mixes_other_pairs(finished):
    """Those that the sampler makes of the split for that epoch, in its order; the baseline has the same batches."""
    data = pq.read_table(finished.path / "confidence" / "dynamics.parquet").to_pandas().drop_duplicates("id")
    counts, split = data.n_tokens.to_numpy(), read_split(finished.path / "split" / "split.parquet")[1]
    scores = Scores(list(data.id), np.arange(29), *[np.zeros(29)] * 2, counts)
    made = [RandomPairs().pairs(split, scores, epoch=epoch, seed=42) for epoch in range(3)]
    order = TrainingOrder(29, made.__getitem__, options=TrainingOptions(global_batch_size=8), seed=42)
    units = [order.batch(step) for step in range(12)]
    mixed = [sum(min(counts[s.row] for s in unit) for unit in batch if len(unit) == 2) for batch in units]
    assert [m["mixup_tokens"] for m in metrics(finished.path)] == mixed
    trained = [sum(counts[s.row] for unit in batch for s in unit) for batch in units]
    for stage in ("train", "baseline"):
        assert [m["ntp_tokens"] for m in metrics(finished.path, stage)] == trained


# ------------------------------------------------------------------------------- reused or refused


# --------------------------------------------------------------------------------- only what is needed


@pytest.mark.parametrize(
    ("words", "stages"),
    [(("--objective", "NTP"), {"train", "base"}), (("--splitter", "RandomSplit"), {"split", "train", "base"})],
)
def test_ntp_needs_no_split_and_a_split_without_confidence_no_reference(words, stages, tiny, made):
    run = made("run", *tiny.options, *SHORT, *words)
    assert {p.name for p in run.iterdir() if p.is_dir()} == stages
    summary = read_json(run / "summary.json")
    assert ("confidence" in summary, summary["mixup_tokens"] > 0) == ("split" in stages, "split" in stages)
    if "split" in stages:
        assert summary["confidence"]["half_a"]["confidence_mean"] is None


@pytest.mark.slow
def test_reference_and_baseline_are_plain_ntp_whatever_the_target_is(tiny, made):
    """Neither perturbed nor weighted; and Mixup alone has no weight beside NTP that could be told."""
    common = ["run", *tiny.options, "--training.max_steps", "3"]
    special = made(*common, "--perturbation", "NEFTune", "--objective", "MixupOnly", "--with_baseline")
    plain = made(*common, "--objective", "NTP", "--pairing", "RandomPairs", out="plain")
    dynamics = [table(run / "confidence" / "dynamics.parquet") for run in (special, plain)]
    assert dynamics[0] == dynamics[1]
    ours, theirs = weights(special, "baseline"), weights(plain)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    summary = read_json(special / "summary.json")
    assert summary["mu_effective"] is None
    assert summary["mixup_tokens"] > 0


def test_the_stage_commands_stop_where_they_say(tiny, made):
    done = set()
    for command, more in (("reference", set()), ("confidence", set()), ("split", set()), ("train", {"base"})):
        run = made(command, *tiny.options, *SHORT)
        done |= {command, *more}
        assert {p.parent.name for p in run.glob("*/MANIFEST.json")} == done
        assert (status(run)["stage"], status(run)["exit_code"]) == (command, 0)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_of_the_run_chooses_rows_and_random_halves(seed, finished, tiny, made):
    """By the hashes of seed and id: 12 of 29 rows, of which 6 are one half."""
    words = ["--selector", "Random", "--selector.k", "12", "--splitter", "RandomSplit", "--seed", str(seed)]
    run = made("split", *tiny.options, *words)
    ids = groups(finished.path).keys()
    chosen = sorted(ids, key=lambda i: stable_hash(seed, "random_selector", i))[:12]
    ranked = sorted(chosen, key=lambda i: stable_hash(seed, "random_split", i))
    assert groups(run) == {i: "half_a" if i in ranked[:6] else "half_b" for i in ids if i in chosen}


class NotesItsSeed(Median):
    seen: ClassVar[list[int]] = []

    def split(self, scores, *, seed):
        self.seen.append(seed)
        return super().split(scores, seed=seed)


@pytest.mark.slow
def test_each_epoch_of_a_single_run_is_split_with_its_seed(tiny, made):
    words = ["--reference", "Online", "--splitter", f"{__name__}.NotesItsSeed", "--training.max_steps", "6"]
    made("train", *tiny.bare, *words, "--seed", "7")
    assert len(NotesItsSeed.seen) > 1
    assert set(NotesItsSeed.seen) == {7}


def test_what_no_step_could_train_is_refused_before_the_reference(tiny, tmp_path, refused):
    told = refused("run", *tiny.options, "--objective", "ManifoldMixup", "--objective.layers", "[0, 99]")
    assert "objective.layers is [0, 99]; allowed: from 0 to" in told
    assert not (tmp_path / "run" / "reference").exists()


class StopAtOnce(Callback):
    def on_stage_start(self, state):
        return CallbackResult(stop=state.stage == "train")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_callback_may_stop_before_the_first_step(finished, tmp_path, dtype):
    """The target is then the base model, in the dtype of its export."""
    config = read_config(finished.path / "config.yaml")
    config = replace(config, out=str(tmp_path / "run"), callbacks=[StopAtOnce()], objective=NTP(), pairing=None)
    summary = run(replace(config, model=replace(config.model, dtype=dtype), with_baseline=False))
    assert summary["stages"]["train"]["steps"] == 0
    assert summary["eval_nll_after"] == pytest.approx(summary["eval_nll_before"], abs=0.02)


class Fails(RandomSplit):
    """It ends the run by an error that nobody foresaw."""

    def split(self, scores, *, seed):
        raise RuntimeError("this split fails")


def test_a_signal_that_comes_while_a_run_ends_does_not_hide_how(finished, tmp_path, monkeypatch):
    """As of torchrun, which ends all ranks when one fails: this rank may be about to note its error."""

    def note(self, real=Hold.status, **fields):
        if fields.get("exit_code"):
            signal.raise_signal(signal.SIGTERM)
        real(self, **fields)

    def end(*_):
        raise SystemExit("as the default of SIGTERM, which ends the process")

    monkeypatch.setattr(Hold, "status", note)
    config = replace(read_config(finished.path / "config.yaml"), out=str(tmp_path / "run"), splitter=Fails())
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(RuntimeError, match="this split fails"):
            run(config, until="split")
        assert status(tmp_path / "run")["exit_code"] == 1
        assert signal.getsignal(signal.SIGTERM) is end
        with pytest.raises(SystemExit), StopSignal("later"):
            signal.raise_signal(signal.SIGTERM)  # nothing came of it within
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stage_that_does_not_exist_is_named(finished, tmp_path):
    config = replace(read_config(finished.path / "config.yaml"), out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="until is 'splitt'; allowed: reference, confidence, split, train"):
        run(config, until="splitt")


# ------------------------------------------------------------------------------------- lengths


def test_a_length_above_the_context_is_refused(tiny, refused):
    told = refused("run", *tiny.options, "--reference.model.max_length", "129")
    assert f"reference.model.max_length is 129, but {tiny.model} has a context of 128 tokens" in told


# -------------------------------------------------------------------------------------- exported models


def test_the_exported_model_loads_and_generates(finished):
    model = AutoModelForCausalLM.from_pretrained(finished.path / "train" / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(finished.path / "train" / "model")
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # tied, as the base model is
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "Add 1 and 2."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0]
    assert len(out) > prompt["input_ids"].shape[1]


def stored_dtypes(model: Path) -> set[str]:
    with safe_open(model / "model.safetensors", "pt") as file:
        return {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_a_model_stored_in_bfloat16_is_exported_in_bfloat16_and_trained_in_float32(tiny, tmp_path, made, sftmix):
    """T19, T20: master weights stay float32 (the checkpoint has them), the files have the dtype their config says."""
    AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16).save_pretrained(tiny.model)
    words = [*tiny.options, "--training.max_steps", "2", "--objective", "NTP", "--checkpoint.every", "1"]
    run = made("run", *words, "--checkpoint.rounding", "nearest")
    exported = run / "train" / "model"
    assert stored_dtypes(exported) == {"torch.bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.bfloat16
    again = tmp_path / "exported"
    assert sftmix("export", str(run), "--to", str(again), "--dtype", "float32").code == 0
    assert stored_dtypes(again) == {"torch.float32"}
    full = AutoModelForCausalLM.from_pretrained(again).state_dict()
    half = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    assert all(torch.equal(full[k].to(torch.bfloat16), half[k]) for k in half)
    assert any(not torch.equal(full[k], half[k].float()) for k in half)  # more than bfloat16 was trained
