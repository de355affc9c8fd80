"""F6: a full disk, on a small file system in memory."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sftmix.config import RunConfig
from sftmix.data.report import DataReport
from sftmix.disk.appended import append_batch
from sftmix.disk.files import verify_directory, write_text
from sftmix.measure.summary import summarise
from sftmix.ranks.world import World
from sftmix.training.metrics import MetricsLog
from sftmix.words.errors import NoSpaceError
from tests.faults.runs import checkpoints, from_split, goes_on, long, words_of
from tests.forked import Ended, ended, on_ranks
from tests.tiny import in_this_process, status

FILL = '''
import shutil
from pathlib import Path
from sftmix.components import Callback

class Fill(Callback):
    """Leaves only so many bytes free on the disk of the run, at step 7."""
    gives = frozenset()
    def __init__(self, *, leave: int):
        self.leave = leave
    def on_step_end(self, state):
        filler = Path(state.directory, "..", "..", "filler")
        if (state.stage, state.step) == ("train", 7) and state.is_main and not filler.exists():
            with filler.open("wb") as file:
                file.write(bytes(max(0, shutil.disk_usage(filler.parent).free - self.leave)))
'''
SECONDS = 10
"""From the moment when the disk is full to the end of the last rank."""
CHECKPOINT = 400_000
"""Bytes of a checkpoint of the tiny model, a little less than it has."""


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A file system in memory, of a size that a second call changes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def sized(size: str) -> Path:
        how = f"remount,size={size}" if mounted else f"size={size}"
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)], capture_output=True, check=False
        )
        if made.returncode:
            pytest.skip("no file system can be mounted here: that needs root")
        mounted.append(size)
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def names_the_bytes(it: Ended, run: Path) -> None:
    assert f"no space left to write {run.name}/" in it.printed
    assert "are free; free some and run again" in it.printed
    assert "Traceback" not in it.printed


def resumes_its_metrics(world: World, place: str) -> None:
    with pytest.raises(NoSpaceError, match=r"metrics\.jsonl"):
        MetricsLog(Path(place) / "metrics.jsonl", resume_step=1, world=world)


def summarises(world: World, place: str) -> None:
    with pytest.raises(NoSpaceError, match=r"summary\.json") as told:
        summarise(Path(place), world, DataReport(), RunConfig(), to=Path(place))
    assert told.value.everywhere


@pytest.mark.slow
def test_without_room_metrics_and_summary_end_every_rank_and_answers_name_their_file(disk):
    place = disk("64k")
    (place / "metrics.jsonl").write_text('{"step": 1}\n')
    (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free))
    on_ranks(resumes_its_metrics, str(place))
    on_ranks(summarises, str(place))
    with pytest.raises(NoSpaceError, match=r"answers\.jsonl\.parts"):
        append_batch(place / "answers.jsonl.parts", [{"key": ("m", "a", 0), "answers": "x" * 5000}])


def test_a_file_system_without_room_for_one_more_file_says_so(disk):
    place = disk("1m,nr_inodes=6")

    def many() -> None:
        for number in range(9):
            write_text(place / str(number), "x")

    with pytest.raises(NoSpaceError, match=r"disk/\d: the file system holds as many files as it can \(inodes"):
        many()


def test_the_free_bytes_are_those_of_the_directory_that_is_written(disk, tmp_path):
    """A verification writes in a directory of links to a run that is elsewhere."""
    place = disk("64k")
    (tmp_path / "elsewhere").touch()
    (place / "figures.json").symlink_to(tmp_path / "elsewhere")
    (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free))
    with pytest.raises(NoSpaceError, match=r"figures\.json: 0 are free"):
        write_text(place / "figures.json", "x" * 9000)


def test_an_export_says_how_many_bytes_it_needs(finished, disk, tmp_path):
    place = disk("100k")
    it = in_this_process("export", str(finished.path), "--to", f"{place}/model", cwd=tmp_path)
    assert it.returncode == 7, it.stderr
    (needed,) = re.findall(
        r"no space left to write \S+/\.tmp-model\.\d+: ([\d,]+) bytes are needed, [\d,]+ are free", it.stderr
    )
    model = finished.path / "train" / "model"
    weights = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    assert int(needed.replace(",", "")) == weights
    assert list(place.iterdir()) == []


@long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("leave", [CHECKPOINT // 2, 0], ids=["half a checkpoint", "nothing"])
def test_a_disk_that_fills_up(small, whole, request, disk, leave, ranks):
    more = ["--training.parallel", "fsdp"] if ranks > 1 else []
    whole = request.getfixturevalue("whole_of_two") if ranks > 1 else whole
    place = disk("6m")
    (place / "filling.py").write_text(FILL)
    words = words_of(small, *more, "--callbacks+", "filling.Fill", "--callbacks.leave", str(leave))
    run = from_split(whole, place)
    it = ended(words, cwd=place, faults=[None] * ranks)
    seconds = time.time() - (place / "filler").stat().st_mtime
    assert seconds < SECONDS
    assert it.codes == [7] * ranks, it.printed
    names_the_bytes(it, run)
    assert checkpoints(run) == ["step-00000003", "step-00000006"]
    assert verify_directory(run / "train" / "checkpoints" / "step-00000006", within=run / "train") is None
    if leave:
        assert status(run)["exit_code"] == 7
        assert " bytes are needed, " in it.printed
    disk("30m")
    os.remove(place / "filler")
    (place / "filler").touch()  # or it would be filled again
    assert "resuming after step 6" in goes_on(words, place, whole, ranks=ranks)
