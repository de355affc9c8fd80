"""What other stages made is verified, too: the selection, the split, adapters, callbacks."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sftmix.components.base import Callback, CallbackResult
from sftmix.disk.files import read_steps
from sftmix.disk.tables import read_columns, read_split, write_split, write_table
from tests.tools.verify.runs import Copy, certified, differing, made, one_bit_of_a_weight


def notes(found, kind: str, *, same: bool | None) -> list[str]:
    return [f["note"] for f in found.findings if f["kind"] == kind and f["same"] is same]


# --------------------------------------------------------------------------- what the training was made from


def with_two_examples_exchanged(file: Path) -> None:
    ids, split = read_split(file)
    first, second = (int(np.flatnonzero(split.group == group)[0]) for group in (0, 1))
    split.group[[first, second]] = split.group[[second, first]]
    write_split(file, ids, split)


def with_the_confidence_turned_around(file: Path) -> None:
    table = read_columns(file, "id", "confidence", "variability")
    write_table(file, table["id"], confidence=-table["confidence"], variability=table["variability"])


def without_the_last_id(file: Path) -> None:
    write_table(file, read_columns(file, "id")["id"][:-2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("until", "name", "change", "column"),
    [
        ("split", "split/split.parquet", with_two_examples_exchanged, "group"),
        pytest.param(
            *("confidence", "confidence/confidence.parquet", with_the_confidence_turned_around, "confidence"),
            marks=pytest.mark.long,
        ),
        pytest.param("split", "selection/selected.parquet", without_the_last_id, "id", marks=pytest.mark.long),
    ],
    ids=["split", "confidence", "selection"],
)
def test_what_was_changed_before_the_training_is_found(honest, tmp_path, sftmix, until, name, change, column):
    """Its hash is mended, and all later stages record the changed file."""
    words = [*honest.tiny.options, "--training.max_steps", "2", "--checkpoint.every", "1"]
    words += ["--selector", "Longest", "--selector.k", "24", "--out", str(tmp_path / "run")]
    stage = Copy(honest.tiny, tmp_path / "run")
    if name.startswith("selection"):  # the rows of all stages follow from it
        assert sftmix("reference", *words).code == 0
        stage.edit(name, change)
        shutil.rmtree(stage.run / "reference")
        shutil.rmtree(stage.run / "confidence")
    else:
        assert sftmix(until, *words).code == 0
        stage.edit(name, change)
    assert sftmix("run", *words).code == 0
    found = certified(sftmix, str(stage.run), "--from", "0")
    assert (found.code, differing(found)) == (4, {"split"})
    (note,) = notes(found, "split", same=False)
    assert note.startswith(f"{name}, {column}")


# ------------------------------------------------------------------------------------ adapters, callbacks


@pytest.mark.slow
def test_a_run_of_adapters_is_certified_and_a_changed_adapter_found(tmp_path, sftmix):
    words = ("--objective", "NTP", "--model.lora.r", "2", "--model.lora.target_modules", "[q_proj, down_proj]")
    copy = made(tmp_path, *words)
    for start in ("0", "2"):
        found = certified(sftmix, str(copy.run), "--from", start)
        assert (found.code, found.exact, found.to) == (0, True, int(start) + 2)
    copy.edit("train/model/adapter_model.safetensors", one_bit_of_a_weight)
    found = certified(sftmix, str(copy.run))
    assert (found.code, differing(found)) == (4, {"model"})
    shutil.rmtree(copy.run / "train" / "checkpoints")
    found = certified(sftmix, str(copy.run))
    assert (found.code, found.to, differing(found)) == (4, 6, {"weights"})


@pytest.mark.slow
def test_a_run_whose_optimizer_keeps_bfloat16_is_certified(tmp_path, sftmix):
    run = made(tmp_path, "--objective", "NTP", "--optimizer", "tests.components.test_optimizers.Rounded").run
    found = certified(sftmix, str(run), "--from", "2", "--trust")
    assert (found.code, found.same, found.exact) == (0, True, True)


class Watcher(Callback):
    """An observer that counts its steps for all the world to see."""

    gives = frozenset()
    steps = 0

    def on_step_end(self, state):
        Watcher.steps += 1
        return CallbackResult(metrics={"watched": float(Watcher.steps)})


class Reader(Callback):
    """A callback that may decide, and reads the log of the steps before."""

    def on_step_end(self, state):
        return CallbackResult(metrics={"steps_before": float(len(read_steps(state.directory)))})


@pytest.mark.long
@pytest.mark.slow
def test_observers_hear_of_no_step_twice_and_others_find_the_steps_before_the_window(tmp_path, sftmix):
    """The figures of observers are not claimed; those of the others are compared."""
    words = ("--callbacks+", f"{__name__}.Watcher", "--callbacks+", f"{__name__}.Reader")
    run = made(tmp_path, "--objective", "NTP", *words).run
    third = read_steps(run / "train")[2]
    assert (Watcher.steps, third["watched"], third["steps_before"]) == (6, 3.0, 2.0)
    found = certified(sftmix, str(run), "--from", "2", "--trust")
    assert Watcher.steps == 6
    assert (found.code, found.same, found.exact) == (0, True, False)
    assert [note.split(":")[0] for note in notes(found, "losses", same=None)] == ["watched"]
    (compared,) = notes(found, "losses", same=True)
    assert re.search("steps_before.*bit for bit", compared)
