"""Checkpoints of a model with adapters: only what is trained, exact at any world size (T15)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from sftmix.adapters import add_adapters
from sftmix.components import NTP
from sftmix.data.batching import Slot, collate
from sftmix.errors import CheckpointError
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.distributed import World, unwrap, wrap
from sftmix.training.optim import build_optimizer
from sftmix.training.step import TrainingModule
from tests.toy import on_ranks, toy_model, toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
EVERYWHERE = ["c_attn", "c_fc", "wte", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "everywhere": {"target_modules": EVERYWHERE},
    "head in full": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True, "bias": "all"},
}


def trained(kind: str, *, steps: int, seed: int = 0, world: World | None = None, parallel: str = "none"):
    """A wrapped, tied model with adapters and its optimizer after some steps on the same batch on every rank."""
    world = world or World()
    model = toy_model(dtype=torch.float32, tied=True)
    add_adapters(model, LoraOptions(r=4, **KINDS[kind]), seed=seed)
    wrapped = wrap(TrainingModule(model), parallel=parallel, precision="fp32", world=world)
    optimizer = build_optimizer(wrapped, TrainingOptions(learning_rate=0.01))
    it = SimpleNamespace(wrapped=wrapped, optimizer=optimizer)
    for _ in range(steps):
        step(it)
    return it


def step(it) -> None:
    batch = collate([(Slot(row),) for row in range(len(DATA))], DATA)
    it.wrapped(batch, NTP().plan(batch, step=0, total_steps=1, seed=0)).loss.backward()
    it.optimizer.step()
    it.optimizer.zero_grad()


def everything(it) -> dict[str, torch.Tensor]:
    """The trained weights and the whole optimizer state, gathered, by name (on rank 0; call it on every rank)."""
    optimizer = get_optimizer_state_dict(unwrap(it.wrapped), it.optimizer, options=FULL)
    found = full_weights(it.wrapped) | {k: v for k, v in optimizer.items() if isinstance(v, torch.Tensor)}
    return {k: v.clone().contiguous() for k, v in found.items()}


def assert_exact(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def fsdp_ranks(world: World, path: str) -> None:
    """Two ranks: save what they trained, and write out what they load from the one-rank checkpoints."""
    for kind in KINDS:
        it = trained(kind, steps=2, world=world, parallel="fsdp")
        CheckpointStore(Path(path) / f"two-{kind}", keep=1, world=world).save(2, it.wrapped, it.optimizer, {})
        saved = everything(it)
        other = trained(kind, steps=1, seed=7, world=world, parallel="fsdp")
        CheckpointStore(Path(path) / f"one-{kind}", keep=1, world=world).load(2, other.wrapped, other.optimizer)
        loaded = everything(other)
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


@pytest.mark.parametrize("kind", KINDS)
def test_two_fsdp_ranks_to_one(shards, kind):
    one = trained(kind, steps=1, seed=7)
    CheckpointStore(shards / f"two-{kind}", keep=1, world=World()).load(2, one.wrapped, one.optimizer)
    assert_exact(everything(one), load_file(shards / f"two-{kind}.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_one_to_two_fsdp_ranks(shards, kind):
    assert_exact(everything(trained(kind, steps=2)), load_file(shards / f"one-{kind}.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_fsdp_ranks_train_what_one_trains(shards, kind):
    """The same batch on both ranks: their averaged gradient is one rank's."""
    one, two = everything(trained(kind, steps=2)), load_file(shards / f"two-{kind}.safetensors")
    assert one.keys() == two.keys()
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_step_after_a_resume_is_the_same(tmp_path, kind):
    it, other = trained(kind, steps=2), trained(kind, steps=1, seed=7)
    store = CheckpointStore(tmp_path, keep=1, world=World())
    store.save(2, it.wrapped, it.optimizer, {})
    store.load(2, other.wrapped, other.optimizer)
    for each in (it, other):
        step(each)
    assert_exact(everything(it), everything(other))


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
