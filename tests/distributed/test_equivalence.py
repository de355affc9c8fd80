"""Runs that must be equal, through the real command line.

The split is flips-on-a-hair at its median (T32), so runs at different world sizes are compared given the same
reference, confidence and split: their directories are copied, which is what the stages' manifests are for.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fast import some_fast
from tests.faults.mines import KillIn
from tests.faults.runs import assert_same, from_split, steps
from tests.forked import SIGKILLED, done, ended
from tests.tiny import in_this_process, metrics, weights


def command(*words: str, cwd: Path, ranks: int = 1) -> None:
    """A command line that must succeed; of one rank in this process, which has the imports behind it."""
    if ranks > 1:
        done(words, cwd=cwd, ranks=ranks)
    else:
        assert in_this_process(*words, cwd=cwd).returncode == 0


@pytest.fixture(scope="module")
def one(small, tmp_path_factory) -> Path:
    """One process, uninterrupted: what all the others are compared with."""
    place = tmp_path_factory.mktemp("one")
    command("run", *small.options, "--out", "run", cwd=place)
    return place / "run"


def losses(run: Path, stage: str = "train") -> list[float]:
    return [m["loss"] for m in metrics(run, stage)]


def assert_close(a: Path, b: Path, file: str = "model.safetensors") -> None:
    """Within float32 rounding of sums in another order (12 steps of AdamW at 1e-3, which amplifies it)."""
    assert losses(a) == pytest.approx(losses(b), abs=3e-6)
    left, right = (load_file(run / "train" / "model" / file) for run in (a, b))
    assert left.keys() == right.keys()
    assert max(float((left[k] - right[k]).abs().max()) for k in left) < 1e-5
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for count in ("ntp_tokens", "mixup_tokens", "tokens"):
            assert x[count] == y[count]


SLOW = ("--training.learning_rate", "0.001")


@pytest.fixture(scope="module")
def base(plain, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("base")
    command("run", *plain.options, *SLOW, "--out", "run", cwd=place)
    return place / "run"


WAYS = [
    (1, "--training.micro_batch_size 8"),
    (2, "--training.parallel ddp"),
    (2, "--training.parallel fsdp"),
    (1, "--training.padding_free true"),
    (2, "--training.micro_batch_size null --training.micro_batch_tokens 150"),
    (1, "--training.micro_batch_size 2 --training.length_groups 1"),
    (1, "--training.activation_checkpointing true"),
    (1, "--training.chunk_size 5"),
]
HSDP = (4, "--training.parallel hsdp --training.shard_group_size 2")
LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(("ranks", "words"), [*some_fast(WAYS, every=3), pytest.param(*HSDP, marks=LONG)])
def test_same_run_computed_in_another_way(plain, base, tmp_path, ranks, words):
    out = from_split(base, tmp_path)
    command("run", *plain.options, *SLOW, "--out", "run", *words.split(), cwd=tmp_path, ranks=ranks)
    assert_close(base, out)


def test_mu_zero_and_the_baseline_are_ntp_in_the_same_order(small, one, tmp_path):
    """Bit for bit: every loss and every weight."""
    ways = {
        "zero": ("--objective.mu", "0", "--with_baseline"),
        "ntp": ("--objective", "NTP", "--pairing", "RandomPairs"),
    }
    zero, ntp = (from_split(one, tmp_path / name) for name in ways)
    for name, words in ways.items():
        command("run", *small.options, "--out", "run", *words, cwd=tmp_path / name)
    for stage in ("train", "baseline"):
        assert losses(zero, stage) == losses(ntp)
        found, expected = weights(zero, stage), weights(ntp)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(m["mixup_tokens"] == 0 and m["mixup"] == 0 for m in metrics(zero))


# ------------------------------------------------------------------------------------------------------------ adapters

LORA = ("--model.lora.r", "4", "--model.lora.target_modules", "[q_proj, down_proj, embed_tokens, lm_head]")
ADAPTED = (*LORA, *SLOW, "--training.max_steps", "6", "--checkpoint.every", "2", "--out", "run")
ADAPTERS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapted(plain, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("adapted")
    command("run", *plain.options, *ADAPTED, cwd=place)
    return place / "run"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_the_adapters_of_one(plain, adapted, tmp_path, parallel):
    """And one process goes on from the middle of their checkpoints, where they shared the weights (T15)."""
    out = from_split(adapted, tmp_path)
    command("run", *plain.options, *ADAPTED, "--training.parallel", parallel, cwd=tmp_path, ranks=2)
    assert_close(adapted, out, ADAPTERS)
    if parallel == "ddp":
        return
    for path in ("model", "checkpoints/step-00000006"):
        shutil.rmtree(out / "train" / path)
    for name in ("MANIFEST.json", "figures.json"):
        (out / "train" / name).unlink()
    manifest = json.loads((out / "train" / "checkpoints" / "step-00000004" / "MANIFEST.json").read_text())
    assert len([name for name in manifest["files"] if name.endswith(".safetensors")]) == 2  # a shard of each rank
    again = in_this_process("run", *plain.options, *ADAPTED, cwd=tmp_path)
    assert "train: resuming after step 4 of 6" in again.stdout
    assert_close(adapted, out, ADAPTERS)


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("stage", "step", "ranks"),
    [
        ("reference", 7, 1),
        pytest.param("train", 7, 1, marks=pytest.mark.long),
        ("train", 8, 1),
        ("train", 6, 2),
    ],
    ids=["reference", "mid epoch", "end of epoch", "fsdp"],
)
@pytest.mark.slow
def test_a_run_continued_after_kill_is_the_uninterrupted_run(small, one, tmp_path, stage, step, ranks):
    words, whole = ["run", *small.options, "--out", "run", "--checkpoint.every", "4"], one
    if ranks > 1:
        words += ["--training.parallel", "fsdp"]
        whole = from_split(one, tmp_path / "whole")
        command(*words, cwd=whole.parent, ranks=ranks)
    if stage == "train":
        from_split(one, tmp_path)
    mine = KillIn("training/step.py", "train_step", call=step + 1)
    assert ended(words, cwd=tmp_path, faults=[mine] * ranks).codes == [SIGKILLED] * ranks
    assert len(steps(tmp_path / "run", stage)) < 12
    command(*words, cwd=tmp_path, ranks=ranks)
    assert_same(tmp_path / "run", whole)
