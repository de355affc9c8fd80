"""Single-run SFTMix: the losses of one epoch split the data for the next, in the run that is the only one."""

import json
import shutil

import numpy as np
import pytest
import torch

from sftmix.components import Median, RandomPairs
from sftmix.components.base import Callback, CallbackResult, Perturbation
from sftmix.types import Scores, Split
from tests.tiny import Tiny, in_this_process, metrics, table, weights


def options(tiny: Tiny, *more: str) -> list[str]:
    return [*tiny.bare, "--reference", "Online", *more]


@pytest.fixture(scope="module")
def single(finished, tmp_path_factory):
    from sftmix.cli import main

    out = tmp_path_factory.mktemp("single") / "run"
    assert main(["run", *options(finished.tiny), "--with_baseline", "--checkpoint.every", "3", "--out", str(out)]) == 0
    return out


def confidence_of(run) -> dict[str, float]:
    found = table(run / "confidence" / "confidence.parquet")
    return dict(zip(found["id"], found["confidence"], strict=True))


def test_what_is_kept_is_what_the_steps_minimised(single):
    """The NLL that the log sums up step by step is that of the examples, each in its turn."""
    for epoch in range(3):
        kept = table(single / "train" / "online" / f"epoch-{epoch:03d}.parquet")
        steps = [m for m in metrics(single) if m["epoch"] == epoch]
        assert len(kept["id"]) == 29
        assert sum(kept["nll_sum"]) == pytest.approx(sum(m["ntp"] * m["ntp_tokens"] for m in steps), rel=1e-6)
        assert set(kept["n_correct"]) == {-1}


def halves_of(run, epochs: list[int]) -> tuple[Scores, Split]:
    """What the paper's splitter makes of the mean perplexities in these epochs, and the response tokens."""
    kept = [table(run / "train" / "online" / f"epoch-{epoch:03d}.parquet") for epoch in epochs]
    counts = np.array(kept[0]["n_tokens"])
    confidence = -np.mean([np.exp(np.array(k["nll_sum"]) / counts) for k in kept], axis=0)
    scores = Scores(kept[0]["id"], np.arange(29), confidence, np.zeros(29), counts)
    return scores, Median().split(scores, seed=42)


def test_every_epoch_mixes_pairs_of_the_split_that_the_one_before_made(single):
    """With partners of its own; the first epoch mixes nothing."""
    assert sum(m["mixup_tokens"] for m in metrics(single) if m["epoch"] == 0) == 0
    assert not (single / "reference").exists()
    for epoch in (1, 2):
        scores, split = halves_of(single, [epoch - 1])
        pairs = RandomPairs().pairs(split, scores, epoch=epoch, seed=42)
        depth = scores.n_tokens[pairs].min(axis=1)  # four pairs in a batch; the unpaired example is the last
        expected = [int(depth[k : k + 4].sum()) for k in range(0, 14, 4)]
        assert [m["mixup_tokens"] for m in metrics(single) if m["epoch"] == epoch] == expected


def test_a_window_of_two_epochs_is_the_last_two(finished, tmp_path, sftmix):
    """Of four, of one step each: the second and the third decide the fourth."""
    words = options(finished.tiny, "--training.epochs", "4", "--training.global_batch_size", "30")
    assert sftmix("run", *words, "--reference.window", "2", "--out", str(tmp_path)).code == 0
    assert sorted(set(table(tmp_path / "confidence" / "dynamics.parquet")["step"])) == [2, 3]
    scores, split = halves_of(tmp_path, [1, 2])
    found = confidence_of(tmp_path)
    np.testing.assert_allclose([found[i] for i in scores.id], scores.confidence, rtol=1e-12)
    depth = scores.n_tokens[RandomPairs().pairs(split, scores, epoch=3, seed=42)].min(axis=1)
    assert [m["mixup_tokens"] for m in metrics(tmp_path)][3] == depth.sum()


@pytest.fixture(scope="module")
def keeping(finished, tmp_path_factory):
    """The words of a run that keeps its checkpoints, and the run."""
    words = options(finished.tiny, "--checkpoint.every", "3", "--checkpoint.keep", "9")
    place = tmp_path_factory.mktemp("keeping")
    assert in_this_process("run", *words, "--out", "whole", cwd=place).returncode == 0
    return words, place / "whole"


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_continued_single_run_is_the_uninterrupted_one(keeping, tmp_path, sftmix, step):
    """From a checkpoint in the first epoch (4 steps), in the second, and just after it."""
    (words, whole), again = keeping, tmp_path / "again"
    shutil.copytree(whole, again)
    for place in ("MANIFEST.json", "figures.json"):
        (again / "train" / place).unlink()
    for folder in ("train/model", "confidence", "split"):
        shutil.rmtree(again / folder)
    for checkpoint in (again / "train" / "checkpoints").glob("step-*"):
        if int(checkpoint.name[-8:]) > step:
            shutil.rmtree(checkpoint)
    for epoch in range(3):
        if (epoch + 1) * 4 > step:
            (again / "train" / "online" / f"epoch-{epoch:03d}.parquet").unlink()
    assert sftmix("run", *words, "--out", str(again)).code == 0
    assert [m["loss"] for m in metrics(whole)] == [m["loss"] for m in metrics(again)]
    left, right = weights(whole), weights(again)
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert table(whole / "split" / "split.parquet") == table(again / "split" / "split.parquet")


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        ("run", ("--training.max_steps", "3"), "needs a second epoch"),
        ("run", ("--objective.ntp_on", "confident"), "objective.ntp_on all"),
        ("split", (), "there is no split before it"),
    ],
)
def test_what_a_single_run_cannot_do_is_said(finished, tmp_path, sftmix, command, words, named):
    refused = sftmix(command, *options(finished.tiny), *words, "--out", str(tmp_path / "run"))
    assert refused.code == 2
    assert named in refused.err


def test_online_confidence_of_a_reference_needs_no_scoring(finished, tmp_path, sftmix):
    out = tmp_path / "run"
    assert sftmix("reference", *finished.tiny.bare, "--reference.checkpoints", "online", "--out", str(out)).code == 0
    dynamics = table(out / "confidence" / "dynamics.parquet")
    assert sorted(set(dynamics["step"])) == [4, 8, 12]
    assert not (out / "reference" / "scores").exists()
    total = sum(m["ntp"] * m["ntp_tokens"] for m in metrics(out, "reference"))
    assert sum(dynamics["nll_sum"]) == pytest.approx(total, rel=1e-6)


class BreakOnce(Perturbation):
    """The second step (of 4 in an epoch) has one example whose loss is not a number."""

    def embeddings(self, e, mask, *, ids, step, seed):
        factor = [float("nan") if step == 1 and i == min(ids) else 1.0 for i in ids]
        return e * torch.tensor(factor)[:, None, None]


@pytest.mark.parametrize("window", ["1", "null"])
def test_a_loss_that_is_not_finite_leaves_its_example_unpaired(finished, tmp_path, sftmix, window):
    out = tmp_path / "run"
    words = options(finished.tiny, "--training.micro_batch_size", "8", "--training.length_groups", "1")
    words += ["--reference.window", window, "--perturbation", f"{__name__}.BreakOnce"]
    done = sftmix("run", *words, "--out", str(out))
    assert done.code == 0, done.err
    assert "step 2 skipped" in done.out
    assert "epoch 1: 1 of 29 examples have no finite perplexity" in done.out
    first, second = (table(out / "train" / "online" / f"epoch-00{e}.parquet") for e in (0, 1))
    lost = [i for i, n in zip(first["id"], first["n_tokens"], strict=True) if n == 0]
    assert len(lost) == 1
    assert 0 not in second["n_tokens"]
    scored = {i for i, c in confidence_of(out).items() if np.isfinite(c)}
    assert len(scored) == (29 if window == "1" else 28)  # null: the first epoch counts, too


class StopAt(Callback):
    """Asks to stop after so many steps of the target."""

    def __init__(self, *, step: int):
        self.step = step

    def on_step_end(self, state):
        return CallbackResult(stop=state.step == self.step and state.stage == "train")


@pytest.mark.parametrize(("step", "decided_by"), [(4, None), pytest.param(9, 1, marks=pytest.mark.slow)])
def test_a_callback_may_stop_a_single_run(finished, single, tmp_path, sftmix, step, decided_by):
    """In an epoch (4 steps each) or at its end: the split that is shown is that of the last epoch begun, if any.

    The baseline, which nothing stops, sees the batches of the target where there were such.
    """
    out = tmp_path / "run"
    words = ["run", *options(finished.tiny), "--with_baseline", "--out", str(out)]
    words += ["--callbacks+", f"{__name__}.StopAt", "--callbacks.step", str(step)]
    done = sftmix(*words)
    assert done.code == 0, done.err
    assert [len(metrics(out, stage)) for stage in ("train", "baseline")] == [step, 12]
    assert [m["loss"] for m in metrics(out)] == [m["loss"] for m in metrics(single)][:step]
    begun = (step - 1) // 4 + 1
    ours, whole = ([m["ntp_tokens"] for m in metrics(run, "baseline")] for run in (out, single))
    assert ours[: 4 * begun] == whole[: 4 * begun]
    assert sum(ours) == sum(whole)  # each example once in every epoch
    summary = json.loads((out / "summary.json").read_text())
    if decided_by is None:
        assert "stopped in the first epoch" in done.out
        assert not (out / "split").exists()
        assert "confidence" not in summary
    else:
        scores, found = halves_of(out, [decided_by])[0], confidence_of(out)
        np.testing.assert_allclose([found[i] for i in scores.id], scores.confidence, rtol=1e-12)
        assert summary["confidence"]["confident"]["examples"] == 14
    assert sftmix(*words).code == 0
    assert json.loads((out / "summary.json").read_text()) == summary
