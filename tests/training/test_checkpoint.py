"""Checkpoints, also of adapters: exact at any world size, verified when read, and nothing but safetensors and JSON
(T15, T16)."""

import contextlib
import json
import resource
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from sftmix.batches.order import Slot
from sftmix.components import AdamW
from sftmix.disk import files
from sftmix.disk.files import verify_directory
from sftmix.disk.hashes import sha256_file
from sftmix.model.adapters import UNTIES, add_adapters
from sftmix.options import CheckpointOptions, LoraOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.loop import Stage, train
from sftmix.training.parallel import shard_group
from sftmix.training.scoring import Scorer
from sftmix.words.errors import CheckpointError, ConfigError, NoSpaceError, SFTMixError, Stopped
from tests.faults import fuzz
from tests.faults.mines import syncs
from tests.forked import on_ranks
from tests.toy import Interrupt, metrics_of, toy_model, toy_stage
from tests.trained import DATA, Trained, assert_exact

ADAPTERS: dict[str, dict[str, Any]] = {
    "everywhere": {"target_modules": ["c_attn", "c_fc", "wte", "lm_head"]},
    "head in full": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True, "bias": "all"},
}
KINDS = ["untied", "tied", *ADAPTERS]
if Version(transformers.__version__) < UNTIES:  # refused there
    KINDS.remove("head in full")


def trained(kind: str, *, seed: int = 0, **how) -> Trained:
    """A model of its own, or a tied one with adapters."""
    model = toy_model(dtype=torch.float32, tied=kind != "untied", seed=0 if kind in ADAPTERS else seed)
    if kind in ADAPTERS:
        add_adapters(model, LoraOptions(r=4, **ADAPTERS[kind]), seed=seed)
    return Trained(model, **how)


def sharing_ranks(world: World, path: str, name: str, parallel: str, *kinds: str) -> None:
    """Save what the ranks trained, and write out what they load from the one-rank checkpoints."""
    world = replace(world, local_size=2)  # of hsdp, two groups of two
    for kind in kinds:
        it = trained(kind, steps=2, world=world, parallel=parallel)
        Scorer(world=world)(it.wrapped, DATA)  # as a callback does; it leaves the head's group gathered
        CheckpointStore(Path(path) / f"{name}-{kind}", keep=1, world=world).save(2, it.wrapped, it.optimizer, {"a": 1})
        saved = it.everything()
        other = trained(kind, steps=1, seed=7, world=world, parallel=parallel)
        store = CheckpointStore(Path(path) / f"one-{kind}", keep=1, world=world)
        store.load(3, other.wrapped, other.optimizer)
        assert store.state(3) == {"b": 2, "step": 3}
        loaded = other.everything()
        if world.is_main:
            save_file(saved, Path(path) / f"{name}-{kind}.safetensors")
            save_file(loaded, Path(path) / f"{name}-from-one-{kind}.safetensors")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    for kind in KINDS:
        it = trained(kind, steps=3)
        CheckpointStore(path / f"one-{kind}", keep=1, world=World()).save(3, it.wrapped, it.optimizer, {"b": 2})
    on_ranks(sharing_ranks, str(path), "two", "fsdp", *KINDS)
    on_ranks(sharing_ranks, str(path), "four", "hsdp", "tied", ranks=4)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [*(("two", kind) for kind in KINDS), ("four", "tied")])
def test_two_fsdp_ranks_to_one_and_back(shards, name, kind):
    """T15: each rank wrote its own shard of what is trained and of the optimizer; one process has them all.

    Stored are weights and two moments of each: nothing of the base model, and a tied head once.
    """
    one = trained(kind, steps=1, seed=7)
    store = CheckpointStore(shards / f"{name}-{kind}", keep=1, world=World())
    store.load(2, one.wrapped, one.optimizer)
    assert store.state(2) == {"a": 1, "step": 2}
    assert_exact(one.everything(), load_file(shards / f"{name}-{kind}.safetensors"))
    assert_exact(trained(kind, steps=3).everything(), load_file(shards / f"{name}-from-one-{kind}.safetensors"))
    names = {name for name, p in one.wrapped.named_parameters() if p.requires_grad}
    for place in (f"one-{kind}/step-00000003", f"{name}-{kind}/step-00000002"):
        stored = {name for file in (shards / place).glob("*.safetensors") for name in load_file(file)}
        assert {name for name in stored if name.startswith("weights/")} == {f"weights/{name}" for name in names}
        moments = {name for name in stored if name.startswith("optimizer/state.") and not name.endswith(".step")}
        assert moments == {f"optimizer/state.{n}.{m}" for n in names for m in ("exp_avg", "exp_avg_sq")}


def test_ranks_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(
        ConfigError, match=r"shard_group_size is 3, which does not divide the 4 ranks; allowed: .* of 4"
    ):
        shard_group(None, World(size=4, local_size=3))


@pytest.mark.parametrize("kind", KINDS)
def test_one_to_one_and_the_next_step_is_the_same(tmp_path, kind):
    it, other = trained(kind, steps=2), trained(kind, steps=1, seed=7)
    store = CheckpointStore(tmp_path, keep=1, world=World())
    store.save(2, it.wrapped, it.optimizer, {})
    store.load(2, other.wrapped, other.optimizer)
    model = other.wrapped.model
    if kind in ("untied", "tied"):
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is (kind == "tied")  # T16
    for each in (it, other):
        each.step()
    assert_exact(it.everything(), other.everything())


@pytest.mark.parametrize(
    ("saved", "now", "problem"),
    [
        ("dora", "everywhere", r"step-00000001 holds the state of '.*c_attn.*bias', which is not trained here"),
        ("everywhere", "dora", r"step-00000001 holds the state of '.*lora_A.*', which is not trained here"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(tmp_path, saved, now, problem):
    store = CheckpointStore(tmp_path, keep=1, world=World())
    it, other = trained(saved, steps=1), trained(now, steps=1)
    store.save(1, it.wrapped, it.optimizer, {})
    with pytest.raises(CheckpointError, match=problem):
        store.load(1, other.wrapped, other.optimizer)
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be read .*Missing key.*(bias|lora_)"):
        store.load(1, other.wrapped, None)


# ----------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    """Checkpoints of steps 1 and 2; their weights differ."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, world=World())
    for step in (1, 2):
        it = trained("untied", steps=step)
        store.save(step, it.wrapped, it.optimizer, {"n": step})
    return store


def flip_a_bit(directory: Path) -> None:
    file = min(directory.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 4  # of a weight: safetensors itself would not notice
    file.write_bytes(content)


def delete_a_file(directory: Path) -> None:
    max(directory.glob("*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, delete_a_file])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(store, damage):
    """When all are damaged nothing starts afresh. Every damage of every file: tests/faults/test_damage.py."""
    assert store.newest_valid() == 2
    damage(store.path(2))
    it = trained("untied", steps=0, seed=9)
    if damage is delete_a_file:  # since it was hashed: a run may go on beside an export, and delete its oldest one
        with pytest.raises(CheckpointError, match="step-00000002"):
            store.load(2, it.wrapped, it.optimizer)
    with pytest.warns(UserWarning, match=r"skipping checkpoint .*step-00000002: "):
        assert store.newest_valid() == 1
    with pytest.raises(CheckpointError, match="step-00000002"):
        store.load(2, it.wrapped, it.optimizer)
    store.load(1, it.wrapped, it.optimizer)
    assert_exact(it.everything(), trained("untied", steps=1).everything())
    damage(store.path(1))
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(CheckpointError, match="no checkpoint in"):
        store.newest_valid()


def hashing_ranks(world: World, path: str) -> None:
    """Write which bytes this rank hashed of two checkpoints, of which the newer one is damaged."""
    read: list[Path] = []

    def noted(file: Path, size: int | None = None) -> str:
        read.append(file)
        return sha256_file(file, size)

    files.sha256_file = noted
    store = CheckpointStore(Path(path), keep=2, world=world)
    with contextlib.nullcontext() if world.rank else pytest.warns(UserWarning, match="skipping"):
        newest = store.newest_valid()
    files.sha256_file = sha256_file
    sizes = [(file.parent.name, file.name, file.stat().st_size) for file in read]
    Path(path, f"rank-{world.rank}.json").write_text(json.dumps([newest, sizes]))


@pytest.mark.slow
def test_ranks_share_the_hashing_of_a_checkpoint(store):
    """Each file is read by one rank, and what one of them finds is known to both.

    A rank that found damage begins no further file of that checkpoint: some of its files are not read.
    """
    flip_a_bit(store.path(2))
    on_ranks(hashing_ranks, str(store.directory))
    ranks = [json.loads((store.directory / f"rank-{rank}.json").read_bytes()) for rank in (0, 1)]
    assert [newest for newest, _ in ranks] == [1, 1]
    for step in (1, 2):
        of = [[(name, size) for place, name, size in read if place == store.path(step).name] for _, read in ranks]
        manifest = json.loads((store.path(step) / files.MANIFEST).read_bytes())["files"]
        hashed = [name for names in of for name, _ in names]
        assert len(hashed) == len(set(hashed))
        assert set(hashed) == set(manifest) if step == 1 else set(hashed) <= set(manifest)
        assert all(of)
        sizes = [entry["bytes"] for entry in manifest.values()]
        assert max(sum(size for _, size in names) for names in of) <= sum(sizes) / 2 + max(sizes)


def test_where_an_old_one_cannot_be_removed_the_new_one_stands(store, tmp_path):
    """A link takes the part of a directory on a network that a reader still holds: neither can be removed."""
    store.path(1).rename(tmp_path / "elsewhere")
    store.path(1).symlink_to(tmp_path / "elsewhere")
    it = trained("untied", steps=0)
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


def one_rank_cannot_write(world: World, path: str) -> None:
    it = trained("untied", steps=1, world=world, parallel="fsdp")
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # writes fail with EFBIG
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be written \(.*File too large"):
        CheckpointStore(Path(path), keep=1, world=world).save(1, it.wrapped, it.optimizer, {})
    assert list(Path(path).iterdir()) == []


@pytest.mark.slow
def test_what_one_rank_cannot_write_ends_every_rank(tmp_path):
    on_ranks(one_rank_cannot_write, str(tmp_path))


# ------------------------------------------------------------------------------------------ in the loop


def stage(directory: Path, *, identity: str, steps: int = 3, **more) -> Stage:
    more |= {"data": DATA, "checkpoint": CheckpointOptions(every=1, keep=2), "identity": identity}
    more["model"] = toy_model(dtype=torch.float32, tied=True)
    return toy_stage(directory, [[(Slot(0),), (Slot(1),)]] * steps, options={"learning_rate": 0.01}, **more)


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path):
    train(stage(tmp_path, identity="these"), World())
    other = stage(tmp_path, identity="those")
    other.model = toy_model(dtype=torch.float32, tied=False)  # by its identity, before other weights are met
    with pytest.raises(ConfigError, match="belongs to a run on other inputs"):
        train(other, World())


def test_the_loop_goes_back_to_the_newest_valid_one_and_ends_the_same(tmp_path):
    whole = train(stage(tmp_path / "whole", identity="x"), World())
    half = tmp_path / "half"
    train(stage(half, identity="x", steps=2), World())
    flip_a_bit(half / "checkpoints" / "step-00000002")
    with pytest.warns(UserWarning, match="skipping checkpoint"):
        resumed = train(stage(half, identity="x"), World())
    assert (
        verify_directory(half / "checkpoints" / "step-00000002", within=half) is None
    )  # written over what was damaged
    assert_exact(full_weights(whole.module), full_weights(resumed.module))
    assert [line["step"] for line in metrics_of(half)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["state.json", "optimizer.json"])
def test_a_resume_from_values_that_no_run_writes_goes_on_or_ends_in_one_line(name, tmp_path):
    """Every field with every value of the fuzz, under a manifest that fits; other errors than ours fail the test."""
    train(stage(tmp_path / "half", identity="x", steps=2), World())
    content, ends = fuzz.read(tmp_path / "half" / "checkpoints" / "step-00000002" / name), Counter[str]()
    for case in fuzz.cases(content)[::7]:
        copy = Path(shutil.copytree(tmp_path / "half", tmp_path / "copy"))
        file = copy / "checkpoints" / "step-00000002" / name
        fuzz.write(file, case.content)
        fuzz.refit(copy, file)
        try:
            train(stage(copy, identity="x"), World())
            ends["went on"] += 1
        except SFTMixError as error:
            ends[type(error).__name__] += 1
        shutil.rmtree(copy)
    assert ends["DifferenceError"] > 5, ends


def test_a_step_whose_report_met_a_full_disk_is_not_saved(tmp_path):
    """The resumed run would go on after it, and nothing would be told of it."""

    def full_at_2(step: int, total: int) -> None:
        if step == 2:
            raise NoSpaceError("full at step 2")

    with pytest.raises(NoSpaceError, match="full at step 2"):
        train(stage(tmp_path, identity="x", on_progress=full_at_2), World())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    train(stage(tmp_path, identity="x"), World())
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]


def test_a_checkpoint_that_survives_a_power_cut_has_the_lines_of_its_steps(tmp_path):
    with syncs() as seen, pytest.raises(Stopped):
        train(replace(stage(tmp_path, identity="x"), callbacks=[Interrupt(step=2)]), World())
    lines = 0
    for path, content in seen:
        if path.name == "metrics.jsonl":
            lines = content.count(b"\n")
        elif path.name == "MANIFEST.json":
            assert f"{lines:08d}" in path.parent.name
    assert lines == 2


# ------------------------------------------------------------------------------------------ room for them


class Huge(AdamW):
    """Bytes of state per number for which no disk has room."""

    state_bytes = 1e15


@pytest.mark.parametrize(("steps", "saves", "count"), [(0, 1, 1), (0, 9, 3), (1, 9, 2), (2, 9, 1)])
def test_the_checkpoints_to_come_are_estimated(tmp_path, steps, saves, count):
    it, store = trained("tied", steps=1), CheckpointStore(tmp_path, keep=2, world=World())
    for step in range(1, steps + 1):
        store.save(step, it.wrapped, it.optimizer, {})
    numbers = sum(p.numel() for p in it.wrapped.parameters())  # of 4 bytes each
    needed = store.bytes_to_come(it.wrapped, state_bytes=16, saves=saves)
    assert needed == pytest.approx(1.2 * numbers * 20 * count, abs=4)


def test_too_little_room_is_refused_with_the_bytes_before_the_first_step(tmp_path):
    with pytest.raises(NoSpaceError, match=r"too little room for what is to be saved in .*: [\d,]+ bytes are"):
        train(stage(tmp_path, identity="x", optimizer=Huge()), World())
    assert not (tmp_path / "metrics.jsonl").exists()
