"""Checkpoints of a model with adapters: only what is trained, exact at any world size (T15)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftmix.common.errors import CheckpointError
from sftmix.common.world import World
from sftmix.model.adapters import add_adapters
from sftmix.options import LoraOptions
from sftmix.training.checkpoint import CheckpointStore
from tests.forked import on_ranks
from tests.toy import toy_model
from tests.trained import Trained, assert_exact

EVERYWHERE = ["c_attn", "c_fc", "wte", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "everywhere": {"target_modules": EVERYWHERE},
    "head in full": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True, "bias": "all"},
}


def trained(kind: str, *, seed: int = 0, **how) -> Trained:
    """Of a tied model with adapters."""
    model = toy_model(dtype=torch.float32, tied=True)
    add_adapters(model, LoraOptions(r=4, **KINDS[kind]), seed=seed)
    return Trained(model, **how)


def fsdp_ranks(world: World, path: str) -> None:
    """Two ranks: save what they trained, and write out what they load from the one-rank checkpoints."""
    for kind in KINDS:
        it = trained(kind, steps=2, world=world, parallel="fsdp")
        CheckpointStore(Path(path) / f"two-{kind}", keep=1, world=world).save(2, it.wrapped, it.optimizer, {})
        saved = it.everything()
        other = trained(kind, steps=1, seed=7, world=world, parallel="fsdp")
        CheckpointStore(Path(path) / f"one-{kind}", keep=1, world=world).load(2, other.wrapped, other.optimizer)
        loaded = other.everything()
        if world.is_main:
            save_file(saved, Path(path) / f"two-{kind}.safetensors")
            save_file(loaded, Path(path) / f"one-{kind}.safetensors")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    for kind in KINDS:
        it = trained(kind, steps=2)
        CheckpointStore(path / f"one-{kind}", keep=1, world=World()).save(2, it.wrapped, it.optimizer, {})
    on_ranks(fsdp_ranks, str(path))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_fsdp_ranks_to_one(shards, kind):
    one = trained(kind, steps=1, seed=7)
    CheckpointStore(shards / f"two-{kind}", keep=1, world=World()).load(2, one.wrapped, one.optimizer)
    assert_exact(one.everything(), load_file(shards / f"two-{kind}.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_to_two_fsdp_ranks(shards, kind):
    assert_exact(trained(kind, steps=2).everything(), load_file(shards / f"one-{kind}.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_step_after_a_resume_is_the_same(tmp_path, kind):
    it, other = trained(kind, steps=2), trained(kind, steps=1, seed=7)
    store = CheckpointStore(tmp_path, keep=1, world=World())
    store.save(2, it.wrapped, it.optimizer, {})
    store.load(2, other.wrapped, other.optimizer)
    for each in (it, other):
        each.step()
    assert_exact(it.everything(), other.everything())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_is_stored(shards, kind):
    """Weights and two moments of each: nothing of the base model, whatever its size."""
    it = trained(kind, steps=0)
    names = {name for name, p in it.wrapped.named_parameters() if p.requires_grad}
    for ranks in ("one", "two"):
        directory = shards / f"{ranks}-{kind}" / "step-00000002"
        stored = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
        assert {k.removeprefix("weights/") for k in stored if k.startswith("weights/")} == names
        moments = {k for k in stored if k.startswith("optimizer/state.") and not k.endswith(".step")}
        assert moments == {f"optimizer/state.{n}.{m}" for n in names for m in ("exp_avg", "exp_avg_sq")}


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, world=World())
    it = trained("dora", steps=1)
    store.save(1, it.wrapped, it.optimizer, {})
    other = trained("everywhere", steps=1)
    with pytest.raises(CheckpointError, match=r"step-00000001 lacks \d+ of \d+ tensors of this run, .*lora_"):
        store.load(1, other.wrapped, other.optimizer)
