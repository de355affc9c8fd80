"""Checkpoints: exact at any world size, verified when read, and nothing but safetensors and JSON (T15, T16)."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftmix.batches.order import Slot
from sftmix.common.errors import CheckpointError, ConfigError, NoSpaceError
from sftmix.common.world import World
from sftmix.options import CheckpointOptions
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.loop import Stage, train
from sftmix.training.scoring import Scorer
from tests.forked import on_ranks
from tests.toy import logged, toy_model, toy_stage
from tests.trained import DATA, Trained, assert_exact


def trained(*, tied: bool, seed: int = 0, **how) -> Trained:
    return Trained(toy_model(dtype=torch.float32, tied=tied, seed=seed), **how)


def fsdp_ranks(world: World, path: str) -> None:
    """Two ranks: save what they trained, and write out what they load from the one-rank checkpoints."""
    for tied in (False, True):
        it = trained(tied=tied, steps=2, world=world, parallel="fsdp")
        Scorer(world=world)(it.wrapped, DATA)  # as a callback does; it leaves the head's group gathered
        CheckpointStore(Path(path) / f"two-{tied}", keep=1, world=world).save(2, it.wrapped, it.optimizer, {"a": 1})
        saved = it.everything()
        other = trained(tied=tied, steps=1, seed=7, world=world, parallel="fsdp")
        state = CheckpointStore(Path(path) / f"one-{tied}", keep=1, world=world).load(3, other.wrapped, other.optimizer)
        assert state == {"b": 2, "step": 3}
        loaded = other.everything()
        if world.is_main:
            save_file(saved, Path(path) / f"two-{tied}.safetensors")
            save_file(loaded, Path(path) / f"one-{tied}.safetensors")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    for tied in (False, True):
        it = trained(tied=tied, steps=3)
        CheckpointStore(path / f"one-{tied}", keep=1, world=World()).save(3, it.wrapped, it.optimizer, {"b": 2})
    on_ranks(fsdp_ranks, str(path))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_fsdp_ranks_to_one(shards, tied):
    """T15: each rank wrote its own shard of weights and optimizer; one process has them all."""
    one = trained(tied=tied, steps=1, seed=7)
    state = CheckpointStore(shards / f"two-{tied}", keep=1, world=World()).load(2, one.wrapped, one.optimizer)
    assert state == {"a": 1, "step": 2}
    assert_exact(one.everything(), load_file(shards / f"two-{tied}.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_to_two_fsdp_ranks(shards, tied):
    assert_exact(trained(tied=tied, steps=3).everything(), load_file(shards / f"one-{tied}.safetensors"))


def hsdp_ranks(world: World, path: str) -> None:
    """Four ranks in two groups: save what they trained, write out what they load from one process and from fsdp."""
    world = replace(world, local_size=2)
    it = trained(tied=True, steps=2, world=world, parallel="hsdp")
    weight = it.wrapped.model.transformer.h[0].mlp.c_fc.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0]
    CheckpointStore(Path(path) / "four", keep=1, world=world).save(2, it.wrapped, it.optimizer, {"a": 1})
    found = {"four": it.everything()}
    for source, step in (("one-True", 3), ("two-True", 2)):
        other = trained(tied=True, steps=1, seed=7, world=world, parallel="hsdp")
        CheckpointStore(Path(path) / source, keep=1, world=world).load(step, other.wrapped, other.optimizer)
        found[f"four-{source}"] = other.everything()
    with pytest.raises(ConfigError, match=r"shard_group_size is 3, but there are 4 ranks; allowed: 1, 2, 4"):
        trained(tied=True, steps=0, world=replace(world, local_size=3), parallel="hsdp")
    if world.is_main:
        for name, tensors in found.items():
            save_file(tensors, Path(path) / f"{name}.safetensors")


@pytest.mark.slow
def test_two_groups_of_two_ranks_and_one_and_two(shards):
    on_ranks(hsdp_ranks, str(shards), ranks=4)
    one = trained(tied=True, steps=1, seed=7)
    CheckpointStore(shards / "four", keep=1, world=World()).load(2, one.wrapped, one.optimizer)
    assert_exact(one.everything(), load_file(shards / "four.safetensors"))
    assert_exact(trained(tied=True, steps=3).everything(), load_file(shards / "four-one-True.safetensors"))
    assert_exact(load_file(shards / "two-True.safetensors"), load_file(shards / "four-two-True.safetensors"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_to_one_and_the_next_step_is_the_same(tmp_path, tied):
    it, other = trained(tied=tied, steps=2), trained(tied=tied, steps=1, seed=7)
    store = CheckpointStore(tmp_path, keep=1, world=World())
    store.save(2, it.wrapped, it.optimizer, {})
    store.load(2, other.wrapped, other.optimizer)
    model = other.wrapped.model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied  # T16
    for each in (it, other):
        each.step()
    assert_exact(it.everything(), other.everything())


@pytest.mark.slow
def test_a_tied_head_is_stored_once(shards):
    def names(kind: str) -> list[str]:
        return [k for f in (shards / kind / "step-00000003").glob("*.safetensors") for k in load_file(f)]

    assert any("lm_head" in n for n in names("one-False"))
    assert not any("lm_head" in n for n in names("one-True"))


# ----------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    """Checkpoints of steps 1 and 2; their weights differ."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, world=World())
    for step in (1, 2):
        it = trained(tied=False, steps=step)
        store.save(step, it.wrapped, it.optimizer, {"n": step})
    return store


def files(directory: Path, pattern: str) -> list[Path]:
    found = sorted(directory.glob(pattern))
    assert found
    return found


def truncate(directory: Path) -> None:
    file = files(directory, "*.safetensors")[0]
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(directory: Path) -> None:
    file = files(directory, "*.safetensors")[0]
    content = bytearray(file.read_bytes())
    content[-5] ^= 4  # of a weight: safetensors itself would not notice
    file.write_bytes(content)


def edit_the_state(directory: Path) -> None:
    file = directory / "state.json"
    file.write_text(file.read_text().replace('"n": ', '"n": 1'))


def delete_a_file(directory: Path) -> None:
    files(directory, "*.safetensors")[-1].unlink()


def delete_the_manifest(directory: Path) -> None:
    (directory / "MANIFEST.json").unlink()


def empty_the_manifest(directory: Path) -> None:
    (directory / "MANIFEST.json").write_text("")


def empty_the_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES = [
    truncate,
    flip_a_bit,
    edit_the_state,
    delete_a_file,
    delete_the_manifest,
    empty_the_manifest,
    empty_the_directory,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(store, damage: Callable[[Path], None]):
    assert store.newest_valid() == 2
    damage(store.path(2))
    with pytest.warns(UserWarning, match=r"skipping checkpoint .*step-00000002: "):
        assert store.newest_valid() == 1
    it = trained(tied=False, steps=0, seed=9)
    with pytest.raises(CheckpointError, match="step-00000002"):
        store.load(2, it.wrapped, it.optimizer)
    assert store.load(1, it.wrapped, it.optimizer)["n"] == 1
    assert_exact(it.everything(), trained(tied=False, steps=1).everything())


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_all_are_damaged_nothing_starts_afresh(store, damage: Callable[[Path], None]):
    for step in (1, 2):
        damage(store.path(step))
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(CheckpointError, match="no checkpoint in"):
        store.newest_valid()


@pytest.mark.parametrize("damage", [truncate, delete_a_file, delete_the_manifest, empty_the_directory])
def test_what_went_since_it_was_hashed_is_missed(store, damage: Callable[[Path], None]):
    """Beside an export a run may go on, and delete its oldest checkpoint."""
    assert store.newest_valid() == 2
    damage(store.path(2))
    it = trained(tied=False, steps=0, seed=9)
    with pytest.raises(CheckpointError, match="step-00000002"):
        store.load(2, it.wrapped, it.optimizer)


def test_an_old_one_that_cannot_be_removed_is_told_and_the_new_one_stands(store, tmp_path):
    """A link takes the part of a directory on a network that a reader still holds: neither can be removed."""
    store.path(1).rename(tmp_path / "elsewhere")
    store.path(1).symlink_to(tmp_path / "elsewhere")
    it = trained(tied=False, steps=0)
    with pytest.warns(UserWarning, match="step-00000001 cannot be removed"):
        store.save(3, it.wrapped, it.optimizer, {})
    assert store.newest_valid() == 3
    assert store.steps() == [3, 2, 1]


def test_what_a_kill_left_behind_is_no_checkpoint_and_goes(store):
    leftover = store.directory / ".tmp-step-00000003.99999"
    shutil.copytree(store.path(2), leftover)
    assert store.steps() == [2, 1]
    assert store.newest_valid() == 2
    assert leftover.exists()  # a reader (export, beside a run that is saving) removes nothing
    store.clean()
    assert not leftover.exists()
    shutil.copytree(store.path(2), leftover)
    it = trained(tied=False, steps=0)
    store.save(3, it.wrapped, it.optimizer, {})
    assert not leftover.exists()


def test_a_step_can_be_saved_again(store):
    """A run continued from an earlier step writes over what was damaged."""
    flip_a_bit(store.path(2))
    it = trained(tied=False, steps=2)
    store.save(2, it.wrapped, it.optimizer, {"n": 5})
    assert store.newest_valid() == 2
    assert store.load(2, it.wrapped, it.optimizer) == {"n": 5, "step": 2}


def one_rank_cannot_write(world: World, path: str) -> None:
    it = trained(tied=False, steps=1, world=world, parallel="fsdp")
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # writes fail with EFBIG
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be written \(.*File too large"):
        CheckpointStore(Path(path), keep=1, world=world).save(1, it.wrapped, it.optimizer, {})
    assert list(Path(path).iterdir()) == []


@pytest.mark.slow
def test_what_one_rank_cannot_write_ends_every_rank(tmp_path):
    on_ranks(one_rank_cannot_write, str(tmp_path))


def test_a_checkpoint_that_cannot_be_written_is_named(store):
    it = trained(tied=False, steps=1)
    store.path(3).touch()  # a file where the directory must be
    with pytest.raises(CheckpointError, match=r"step-00000003 cannot be written \(NotADirectoryError"):
        store.save(3, it.wrapped, it.optimizer, {})
    assert sorted(p.name for p in store.directory.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]


# ------------------------------------------------------------------------------------------ in the loop


def stage(directory: Path, *, identity: str, steps: int = 3, **more) -> Stage:
    more |= {"data": DATA, "checkpoint": CheckpointOptions(every=1, keep=2), "identity": identity}
    more["model"] = toy_model(dtype=torch.float32, tied=True)
    return toy_stage(directory, [[(Slot(0),), (Slot(1),)]] * steps, options={"learning_rate": 0.01}, **more)


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path):
    train(stage(tmp_path, identity="these"), World())
    with pytest.raises(ConfigError, match="belongs to a run on other inputs"):
        train(stage(tmp_path, identity="those"), World())
    other = stage(tmp_path, identity="those")
    other.model = toy_model(dtype=torch.float32, tied=False)  # other weights, too: the same message
    with pytest.raises(ConfigError, match="belongs to a run on other inputs"):
        train(other, World())


def test_the_loop_goes_back_to_the_newest_valid_one_and_ends_the_same(tmp_path):
    whole = train(stage(tmp_path / "whole", identity="x"), World())
    half = tmp_path / "half"
    train(stage(half, identity="x", steps=2), World())
    flip_a_bit(half / "checkpoints" / "step-00000002")
    with pytest.warns(UserWarning, match="skipping checkpoint"):
        resumed = train(stage(half, identity="x"), World())
    assert_exact(full_weights(whole.module), full_weights(resumed.module))
    steps = [json.loads(line)["step"] for line in (half / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_step_whose_report_met_a_full_disk_is_not_saved(tmp_path):
    """The resumed run would go on after it, and nothing would be told of it."""

    def full_at_2(step: int, total: int) -> None:
        if step == 2:
            raise NoSpaceError("full at step 2")

    with pytest.raises(NoSpaceError, match="full at step 2"):
        train(stage(tmp_path, identity="x", on_progress=full_at_2), World())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    train(stage(tmp_path, identity="x"), World())
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]
