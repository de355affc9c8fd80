"""A run with adapters is the same run on one process, under ddp and under fsdp (T15), and after a kill."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import done
from tests.tiny import STAGES, Tiny, in_this_process, make_tiny, metrics

pytestmark = pytest.mark.slow

LORA = ("--model.lora.r", "4", "--model.lora.target_modules", "[q_proj, down_proj, embed_tokens, lm_head]")
OPTIONS = (*LORA, "--training.learning_rate", "0.001", "--training.max_steps", "6", "--checkpoint.every", "2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tiny:
    """The tiny model without dropout, whose masks depend on ranks."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), dropout=0.0)


@pytest.fixture(scope="module")
def one(plain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    assert in_this_process("run", *plain.options, *OPTIONS, "--out", "one", cwd=out.parent).returncode == 0
    return out


def adapters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "train" / "model" / "adapter_model.safetensors")


def losses(run: Path) -> list[float]:
    return [m["loss"] for m in metrics(run)]


def from_the_same_split(one: Path, out: Path) -> Path:
    for stage in STAGES:
        shutil.copytree(one / stage, out / stage)
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_the_adapters_of_one(plain, one, tmp_path, parallel):
    out = from_the_same_split(one, tmp_path / parallel)
    done(["run", *plain.options, *OPTIONS, "--training.parallel", parallel, "--out", parallel], cwd=tmp_path, ranks=2)
    assert losses(one) == pytest.approx(losses(out), abs=3e-6)
    left, right = adapters(one), adapters(out)
    assert left.keys() == right.keys()
    assert max(float((left[k] - right[k]).abs().max()) for k in left) < 1e-5


def test_a_run_continued_on_other_ranks_is_the_same(plain, one, tmp_path):
    """Two fsdp ranks leave a checkpoint after step 4, one process loads it and goes on."""
    out = from_the_same_split(one, tmp_path / "cut")
    words = ["run", *plain.options, *OPTIONS, "--out", "cut"]
    done([*words, "--training.parallel", "fsdp"], cwd=tmp_path, ranks=2)
    shutil.rmtree(out / "train" / "model")
    shutil.rmtree(out / "train" / "checkpoints" / "step-00000006")
    for name in ("MANIFEST.json", "figures.json"):
        (out / "train" / name).unlink()
    manifest = json.loads((out / "train" / "checkpoints" / "step-00000004" / "MANIFEST.json").read_text())
    assert len([name for name in manifest["files"] if name.endswith(".safetensors")]) == 2  # a shard of each rank
    assert "train: resuming after step 4 of 6" in in_this_process(*words, cwd=tmp_path).stdout
    left, right = adapters(one), adapters(out)
    assert max(float((left[k] - right[k]).abs().max()) for k in left) < 1e-5
