"""The run directory: one process at a time, STATUS.json, and stages that belong to their inputs."""

import contextlib
import errno
import os
import shutil
import socket
import time

import psutil
import pytest

from sftmix.disk.files import read_json
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.lock import Hold
from sftmix.pipeline.stages import SPLIT
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError, DataError, DifferenceError
from tests.faults.mines import syncs
from tests.tiny import contents, status

ALONE = World()


@pytest.fixture
def directory(tmp_path):
    with RunDirectory(tmp_path / "run", ALONE) as opened:
        yield opened


def make(directory: RunDirectory, stage: str, inputs: dict) -> None:
    assert directory.begin(stage, inputs) is False
    (directory.path / stage / "out").mkdir()
    for name in ("a", "out/b"):
        (directory.path / stage / name).write_text(name)
    directory.finish(stage, ["a", "out"], {"seconds": 1.5})


@pytest.mark.parametrize("done", [True, False], ids=["finished", "begun"])
def test_other_inputs_are_refused_by_name_and_change_nothing(directory, done):
    inputs = {"model": "1a", "data": {"fingerprint": "2b", "roles": [1, 2]}, "gone": 1}
    inputs["splitter"] = {"class_path": "Median", "init_args": {"of": 1}}
    if done:
        make(directory, "split", inputs)
    else:
        directory.begin("split", inputs)
        (directory.path / "split" / "metrics.jsonl").write_text("{}")
    before = contents(directory.path)
    other = {"model": "1a", "data": {"fingerprint": "4d", "roles": [1, 3]}, "new": 2}
    other["splitter"] = {"class_path": "RandomSplit", "init_args": {}}
    with pytest.raises(ConfigError) as refused:
        directory.begin("split", other, words=SPLIT.words)
    assert str(refused.value).partition("other inputs: ")[2] == (
        "the training rows are others, as the model sees them (data.train, selector, tokenizer, template); data.roles: "
        "[1, 2] -> [1, 3]; gone: 1 -> nothing; splitter: Median -> RandomSplit; new: nothing -> 2. "
        "Use another --out, or the old settings"
    )
    assert contents(directory.path) == before


def test_a_finished_stage_that_does_not_say_what_it_is_of_is_refused(directory):
    make(directory, "split", {"seed": 1})
    (directory.path / "split" / "inputs.json").unlink()
    with pytest.raises(DifferenceError, match=r"split: it is finished, and its inputs\.json is gone"):
        directory.begin("split", {"seed": 2})


def test_what_the_manifest_names_survives_a_power_cut(directory):
    with syncs() as seen:
        make(directory, "split", {})
    names = [path.name.removeprefix(".tmp-").partition(".")[0] for path, _ in seen]
    assert {*names[-4:-1]} == {"a", "b", "figures"}
    assert names[-1] == "MANIFEST"


def test_a_stage_that_made_nothing_yet_may_be_corrected(directory):
    """A first attempt that failed on its options does not pin the directory to them."""
    directory.begin("reference", {"checkpoints": [0, 1000]})
    (directory.path / "reference" / "metrics.jsonl").touch()
    assert directory.begin("reference", {"checkpoints": [0, 8]}) is False
    (directory.path / "reference" / "scores").mkdir()
    with pytest.raises(ConfigError, match="checkpoints"):
        directory.begin("reference", {"checkpoints": [0, 9]})


def test_status_says_what_runs_and_how_it_ended(tmp_path):
    started = time.time()
    with RunDirectory(tmp_path, ALONE) as directory:
        directory.begin("reference", {})
        directory.status(step=3, total_steps=7)
        running = status(tmp_path)
        directory.status(step=4, throttle=60.0)  # too soon after the last one
        assert status(tmp_path)["step"] == 3
    assert started <= running.pop("started") <= running.pop("updated")
    told = {"stage": "reference", "step": 3, "total_steps": 7, "doing": "", "exit_code": None, "message": None}
    created = psutil.Process().create_time()
    assert running == told | {"pid": os.getpid(), "created": created, "host": socket.gethostname()}
    assert status(tmp_path).items() >= {"exit_code": 0, "message": "", "step": 4}.items()


def test_a_clock_that_steps_back_hides_no_status(tmp_path, monkeypatch):
    with RunDirectory(tmp_path, ALONE) as directory:
        directory.status(stage="train", step=1)
        now = time.time() - 3600
        monkeypatch.setattr(time, "time", lambda: now)
        directory.status(step=2)
        assert status(tmp_path)["step"] == 2
    assert status(tmp_path)["exit_code"] == 0


@pytest.mark.parametrize("moved", [True, False])
def test_a_directory_that_is_moved_or_removed_meanwhile_is_not_made_again(tmp_path, moved):
    run = tmp_path / "run"

    def goes_on() -> None:
        with RunDirectory(run, ALONE) as directory:
            directory.begin("train", {})
            if moved:
                run.rename(tmp_path / "elsewhere")
            else:
                shutil.rmtree(run)
            directory.status(step=1, throttle=60.0)

    with pytest.raises(DifferenceError, match=r"run was moved or removed while it was used"):
        goes_on()
    assert not run.exists()
    assert not moved or status(tmp_path / "elsewhere")["exit_code"] is None


def test_a_lock_that_is_removed_meanwhile_is_no_move(tmp_path):
    def goes_on() -> None:
        with RunDirectory(tmp_path / "run", ALONE) as directory:
            directory.begin("train", {})
            (tmp_path / "run" / ".lock").unlink()
            directory.status(step=1, throttle=60.0)

    with pytest.raises(DifferenceError, match=r"run/\.lock was moved or removed while"):
        goes_on()
    with RunDirectory(tmp_path / "run", ALONE) as directory:
        directory.begin("train", {})


@pytest.mark.parametrize("made", [True, False])
def test_a_run_that_failed_is_finished_once_all_its_stages_are_read_back(made, tmp_path):
    with contextlib.suppress(DataError), RunDirectory(tmp_path, ALONE) as directory:
        directory.begin("reference", {})
        if made:
            directory.finish("reference", [], {})
        raise DataError("bad")
    assert [status(tmp_path)[key] for key in ("stage", "message")] == ["reference", "DataError: bad"]
    before = (tmp_path / "STATUS.json").read_bytes()
    with pytest.raises(ConfigError), Hold(tmp_path):
        raise ConfigError("refused")
    assert (tmp_path / "STATUS.json").read_bytes() == before
    with RunDirectory(tmp_path, ALONE) as directory:
        directory.status(stage="train")  # a command that makes nothing
    assert [status(tmp_path)[key] for key in ("stage", "exit_code")] == (["train", 0] if made else ["reference", 3])


@pytest.mark.parametrize("again", [{"a": 2.0, "b": {"d": 1, "c": 1}}, {"b": {"c": 1, "d": 1}, "a": 2}])
def test_inputs_that_are_the_same_are_not_written_again(directory, again):
    """Checkpoints belong to the hash of that file, which would refuse them for another spelling or order."""
    directory.begin("train", {"a": 2, "b": {"c": 1, "d": 1}})
    before = (directory.path / "train" / "inputs.json").read_bytes()
    directory.begin("train", again)
    assert (directory.path / "train" / "inputs.json").read_bytes() == before


# ------------------------------------------------------------------------------------------ adoption


@pytest.fixture
def sibling(directory):
    """A second run directory beside the first, which it may adopt from."""
    path = directory.path.with_name("sibling")
    with RunDirectory(path, ALONE, pool=[path, directory.path]) as opened:
        yield opened


def test_a_stage_that_a_sibling_finished_from_the_same_inputs_is_adopted_with_all_its_files(directory, sibling):
    make(directory, "split", {"data": "x"})
    theirs, ours = directory.path / "split", sibling.path / "split"
    assert sibling.begin("split", {"data": "x"}) is True
    assert read_json(ours / "adopted.json") == {"from": os.path.relpath(theirs, ours)}
    assert contents(ours, but=["adopted.json"]) == contents(theirs)
    assert os.path.samefile(ours / "out" / "b", theirs / "out" / "b")
    assert sibling.begin("split", {"data": "x"}) is True  # and it is found done from now on, by its own manifest
    (ours / "out" / "b").unlink()
    with pytest.raises(DifferenceError, match="out/b is missing"):
        sibling.begin("split", {"data": "x"})
    (ours / "MANIFEST.json").unlink()  # as if it had been interrupted: it is done again
    assert sibling.begin("split", {"data": "x"}) is True
    assert (ours / "out" / "b").read_text() == "out/b"


def test_nothing_is_adopted_from_other_inputs_unfinished_or_damaged_stages(directory, sibling):
    directory.begin("train", {"data": "x"})
    assert sibling.begin("train", {"data": "x"}) is False
    make(directory, "split", {"data": "x"})
    assert sibling.begin("split", {"data": "y"}) is False
    assert not (sibling.path / "split" / "adopted.json").exists()
    make(directory, "confidence", {"data": "x"})
    (directory.path / "confidence" / "a").write_text("edited")
    with pytest.raises(DifferenceError, match="confidence: a does not have the hash"):
        sibling.begin("confidence", {"data": "x"})
    assert sorted(p.name for p in (sibling.path / "confidence").iterdir()) == ["inputs.json"]


def test_an_adoption_without_links_is_a_copy(directory, sibling, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    make(directory, "split", {"data": "x"})
    assert sibling.begin("split", {"data": "x"}) is True
    assert (sibling.path / "split" / "a").read_text() == "a"
    assert not os.path.samefile(sibling.path / "split" / "a", directory.path / "split" / "a")
