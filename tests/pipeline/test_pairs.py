"""Single-run SFTMix: the losses of one epoch split the data for the next, in the run that is the only one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sftmix.components import Median, RandomPairs
from sftmix.components.base import Callback, CallbackResult, Perturbation
from sftmix.disk.files import read_json
from sftmix.types import Scores, Split
from tests.tiny import Tiny, metrics, table, weights

KEEPING = ("--with_baseline", "--checkpoint.every", "3", "--checkpoint.keep", "9")


def options(tiny: Tiny, *more: str) -> list[str]:
    return [*tiny.bare, "--reference", "Online", *more]


@pytest.fixture(scope="module")
def single(finished, tmp_path_factory):
    from sftmix.cli import main

    out = tmp_path_factory.mktemp("single") / "run"
    assert main(["run", *options(finished.tiny), *KEEPING, "--out", str(out)]) == 0
    return out


def online(run: Path, epoch: int) -> dict[str, list]:
    """The losses that the target had in an epoch."""
    return table(run / "train" / "online" / f"epoch-{epoch:03d}.parquet")


def mixed(run: Path, epoch: int) -> list[int]:
    return [m["mixup_tokens"] for m in metrics(run) if m["epoch"] == epoch]


@pytest.mark.slow
def test_what_is_kept_is_what_the_steps_minimised(single):
    """The NLL that the log sums up step by step is that of the examples, each in its turn."""
    for epoch in range(3):
        kept = online(single, epoch)
        steps = [m for m in metrics(single) if m["epoch"] == epoch]
        assert len(kept["id"]) == 29
        assert sum(kept["nll_sum"]) == pytest.approx(sum(m["ntp"] * m["ntp_tokens"] for m in steps), rel=1e-6)
        assert set(kept["n_correct"]) == {-1}


def halves_of(run: Path, epochs: list[int]) -> tuple[Scores, Split]:
    """What the paper's splitter makes of the mean perplexities in these epochs, and the response tokens."""
    kept = [online(run, epoch) for epoch in epochs]
    counts = np.array(kept[0]["n_tokens"])
    confidence = -np.mean([np.exp(np.array(k["nll_sum"]) / counts) for k in kept], axis=0)
    scores = Scores(kept[0]["id"], np.arange(29), confidence, np.zeros(29), counts)
    return scores, Median().split(scores, seed=42)


def depths(run: Path, epochs: list[int], epoch: int) -> np.ndarray:
    """The mixed tokens of each pair of an epoch that these earlier ones split."""
    scores, split = halves_of(run, epochs)
    return scores.n_tokens[RandomPairs().pairs(split, scores, epoch=epoch, seed=42)].min(axis=1)


def test_every_epoch_mixes_pairs_of_the_split_that_the_one_before_made(single):
    """With partners of its own; the first epoch mixes nothing."""
    assert sum(mixed(single, 0)) == 0
    assert not (single / "reference").exists()
    for epoch in (1, 2):
        depth = depths(single, [epoch - 1], epoch)  # four pairs in a batch; the unpaired example is the last
        assert mixed(single, epoch) == [depth[k : k + 4].sum() for k in range(0, 14, 4)]


@pytest.mark.slow
def test_a_window_of_two_epochs_is_the_last_two(finished, made):
    """Of four, of one step each: the second and the third decide the fourth."""
    words = options(finished.tiny, "--training.epochs", "4", "--training.global_batch_size", "30")
    run = made("run", *words, "--reference.window", "2")
    assert sorted(set(table(run / "confidence" / "dynamics.parquet")["step"])) == [2, 3]
    found = table(run / "confidence" / "confidence.parquet")["confidence"]
    np.testing.assert_allclose(found, halves_of(run, [1, 2])[0].confidence, rtol=1e-12)
    assert mixed(run, 3) == [depths(run, [1, 2], 3).sum()]


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, pytest.param(6, marks=pytest.mark.long), 9])
def test_a_continued_single_run_is_the_uninterrupted_one(finished, single, tmp_path, made, step):
    """From a checkpoint in the first epoch (4 steps), in the second, and just after it."""
    whole, again = single, shutil.copytree(single, tmp_path / "run")
    (again / "train" / "MANIFEST.json").unlink()
    for folder in ("train/model", "confidence", "split"):
        shutil.rmtree(again / folder)
    for checkpoint in (again / "train" / "checkpoints").glob("step-*"):
        if int(checkpoint.name[-8:]) > step:
            shutil.rmtree(checkpoint)
    for epoch in range(step // 4, 3):
        (again / "train" / "online" / f"epoch-{epoch:03d}.parquet").unlink()
    made("run", *options(finished.tiny), *KEEPING)
    assert [m["loss"] for m in metrics(whole)] == [m["loss"] for m in metrics(again)]
    left, right = weights(whole), weights(again)
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert table(whole / "split" / "split.parquet") == table(again / "split" / "split.parquet")


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        ("run", ("--training.max_steps", "3"), "needs a second epoch"),
        ("run", ("--training.epochs", "1"), "needs a second epoch"),
        ("run", ("--objective.ntp_on", "confident"), "objective.ntp_on all"),
        ("split", (), "there is no split before it"),
    ],
)
def test_what_a_single_run_cannot_do_is_said(finished, refused, command, words, named):
    assert named in refused(command, *options(finished.tiny), *words)


def test_online_confidence_of_a_reference_needs_no_scoring(finished, made):
    out = made("reference", *finished.tiny.bare, "--reference.checkpoints", "online")
    dynamics = table(out / "confidence" / "dynamics.parquet")
    assert sorted(set(dynamics["step"])) == [4, 8, 12]
    assert not (out / "reference" / "scores").exists()


class BreakOnce(Perturbation):
    """The second step (of 4 in an epoch) has one example whose loss is not a number."""

    def embeddings(self, e, mask, *, ids, step, seed):
        factor = [float("nan") if step == 1 and i == min(ids) else 1.0 for i in ids]
        return e * torch.tensor(factor)[:, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("window", ["1", "null"])
def test_a_loss_that_is_not_finite_leaves_its_example_unpaired(finished, made, window):
    words = options(finished.tiny, "--training.micro_batch_size", "8", "--training.length_groups", "1")
    words += ["--reference.window", window, "--perturbation", f"{__name__}.BreakOnce"]
    out = made("run", *words)
    assert "step 2 skipped" in made.printed
    assert [online(out, epoch)["n_tokens"].count(0) for epoch in (0, 1)] == [1, 0]
    scored = np.isfinite(table(out / "confidence" / "confidence.parquet")["confidence"])
    assert scored.sum() == (29 if window == "1" else 28)  # null: the first epoch counts, too


class StopAt(Callback):
    """Asks to stop after so many steps of the target."""

    def __init__(self, *, step: int):
        self.step = step

    def on_step_end(self, state):
        return CallbackResult(stop=state.step == self.step and state.stage == "train")


@pytest.mark.slow
@pytest.mark.parametrize(("step", "decided_by"), [(4, None), (9, 1)])
def test_a_callback_may_stop_a_single_run(finished, single, made, step, decided_by):
    """In an epoch (4 steps each) or at its end: the split that is shown is that of the last epoch begun, if any.

    The baseline, which nothing stops, sees the batches of the target where there were such.
    """
    words = ["run", *options(finished.tiny), "--with_baseline", "--callbacks+", f"{__name__}.StopAt"]
    out = made(*words, "--callbacks.step", str(step))
    assert [len(metrics(out, stage)) for stage in ("train", "baseline")] == [step, 12]
    assert [m["loss"] for m in metrics(out)] == [m["loss"] for m in metrics(single)][:step]
    begun = (step - 1) // 4 + 1
    ours, whole = ([m["ntp_tokens"] for m in metrics(run, "baseline")] for run in (out, single))
    assert ours[: 4 * begun] == whole[: 4 * begun]
    assert sum(ours) == sum(whole)  # each example once in every epoch
    summary = read_json(out / "summary.json")
    if decided_by is None:
        assert ((out / "split").exists(), "confidence" in summary) == (False, False)
    else:
        found = table(out / "confidence" / "confidence.parquet")["confidence"]
        np.testing.assert_allclose(found, halves_of(out, [decided_by])[0].confidence, rtol=1e-12)
        assert summary["confidence"]["confident"]["examples"] == 14
    made(*words, "--callbacks.step", str(step))
    assert read_json(out / "summary.json") == summary
