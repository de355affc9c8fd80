"""One rank raises and the others see their connections break: the command's error is the first rank's, at once."""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sftmix.ranks import world as worlds
from sftmix.words.errors import ConfigError
from tests.forked import ended
from tests.tiny import sftmix as command
from tests.tiny import status

pytestmark = [pytest.mark.slow, pytest.mark.long]

BREAKS = '''
import time
import torch.distributed as dist
from sftmix.components import NTP

class Breaks(NTP):
    """On one rank the third plan or loss of the training is none; the other ranks may be slow to see it."""

    def __init__(self, *, rank: int, where: str = "loss", slow: bool = False):
        super().__init__()
        self.rank, self.where, self.slow, self.made = rank, where, slow, 0

    def plan(self, batch, **given):
        self.made += 1
        self.fail("plan")
        return super().plan(batch, **given)

    def loss(self, view, batch, plan):
        self.fail("loss")
        return super().loss(view, batch, plan)

    def fail(self, where):
        if dist.is_initialized() and self.made == 3 and self.where == where:
            if dist.get_rank() == self.rank:
                raise ValueError("a broken loss")
            time.sleep(60 * self.slow)
'''
OWN = "ValueError: a broken loss"


def words(tiny, place: Path, rank: int, parallel: str, *more: str) -> list[str]:
    (place / "breaking.py").write_text(BREAKS)
    given = ["--objective", "breaking.Breaks", "--objective.rank", str(rank), "--splitter", "RandomSplit"]
    return ["run", *tiny.bare, *given, *more, "--training.parallel", *parallel.split(), "--out", "run"]


CASES = [("ddp", 0, "loss"), ("ddp", 1, "loss"), ("ddp", 2, "loss"), ("ddp", 1, "plan"), ("fsdp", 1, "loss")]
CASES += [("fsdp --training.reduce_each_micro_batch true", 2, "loss")]
CASES += [("hsdp --training.shard_group_size 1 --training.reshard_after_forward false", 1, "loss")]


@pytest.mark.parametrize(("parallel", "rank", "where"), CASES)
def test_the_status_has_the_error_of_the_rank_that_raised(tiny, tmp_path, parallel, rank, where):
    """Rank 0 waits for it in a collective; and of three ranks one may see another's broken connection."""
    started = time.monotonic()
    asked = words(tiny, tmp_path, rank, parallel, "--objective.where", where)
    it = ended(asked, cwd=tmp_path, faults=[None] * 3)
    assert time.monotonic() - started < 200
    assert it.codes[rank] == 1, it.printed
    found = status(tmp_path / "run")
    assert found["exit_code"] == 1
    assert found["message"] == (OWN if rank == 0 else f"RankError: rank {rank}: {OWN}"), it.printed


def test_a_rank_that_torchrun_stops_before_it_sees_a_broken_connection_has_that_error_too(tiny, tmp_path):
    it = command(*words(tiny, tmp_path, 1, "ddp", "--objective.slow", "true"), ranks=2, cwd=tmp_path)
    assert it.returncode == 1
    found = status(tmp_path / "run")
    assert (found["exit_code"], found["message"]) == (1, f"RankError: rank 1: {OWN}"), it.stderr


BROKEN = ValueError("a broken loss")
REFUSED = ConfigError("objective.weight: not a number")


@dataclass(frozen=True)
class RaisesIn:
    """A function of a module raises at its call of this number, or (None) hangs, as a collective of GPUs does."""

    module: str
    function: str
    call: int
    error: Exception | None = BROKEN

    def __call__(self) -> None:
        module, calls = import_module(self.module), count(1)
        function: Callable[..., Any] = getattr(module, self.function)

        def raising(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                if self.error is None:
                    time.sleep(120)
                raise self.error or BROKEN
            return function(*args, **kwargs)

        setattr(module, self.function, raising)


PASSES = {
    "scoring": (RaisesIn("sftmix.training.scoring", "_scores_of", 2), "--splitter Median"),
    "evaluation": (RaisesIn("sftmix.training.scoring", "_scores_of", 1), "--splitter RandomSplit"),
    "losses of the batch": (RaisesIn("sftmix.training.step", "with_batch_nll", 2), "--objective IRDRO"),
    "probe": (RaisesIn("sftmix.training.parallel", "packing_problem", 1), "--training.padding_free true"),
    "export": (RaisesIn("sftmix.pipeline.loaded", "whole_weights", 1), "--splitter RandomSplit"),
}
"""What ranks do together besides steps, and options with which a run does it."""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", PASSES)
def test_no_rank_waits_for_one_that_raised_between_steps(tiny, tmp_path, name, parallel):
    fault, options = PASSES[name]
    started = time.monotonic()
    asked = ["run", *tiny.bare, *options.split(), "--training.parallel", parallel, "--out", "run"]
    it = ended(asked, cwd=tmp_path, faults=[None, fault])
    assert time.monotonic() - started < 200
    assert it.codes[1] == 1, it.printed
    found = status(tmp_path / "run")
    assert (found["exit_code"], found["message"]) == (1, f"RankError: rank 1: {OWN}"), it.printed


def test_no_rank_waits_for_one_whose_disk_is_full_in_an_export(tiny, tmp_path):
    """The others gather on to the end, where they get the error."""
    fault = RaisesIn("sftmix.model.shards", "_write", 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    asked = ["run", *tiny.bare, "--splitter", "RandomSplit", "--training.parallel", "fsdp", "--out", "run"]
    it = ended(asked, cwd=tmp_path, faults=[fault, None])
    assert it.codes == [7, 7], it.printed
    assert status(tmp_path / "run")["message"].startswith("NoSpaceError: no space left to write run/train/model: ")


@dataclass(frozen=True)
class Refuses(RaisesIn):
    """The same, on a rank that waits for rank 0's error for so many seconds."""

    module: str = "sftmix.training.step"
    function: str = "normalise"
    call: int = 3
    error: Exception | None = REFUSED
    patience: float = 30.0

    def __call__(self) -> None:
        worlds.PATIENCE = self.patience
        super().__call__()


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([Refuses(error=None), Refuses(patience=1.0)], "[rank 1] error: "),
        ([Refuses(), Refuses()], "error: "),
        ([Refuses(error=ConfigError("another")), Refuses()], "[rank 1] error: "),
    ],
    ids=["one", "both", "unlike"],
)
def test_an_error_that_rank_0_does_not_have_is_said_by_the_rank_that_has_it(tiny, tmp_path, faults, said):
    """Without torchrun: srun's ranks hear nothing of each other."""
    it = ended(["run", *tiny.bare, "--splitter", "RandomSplit", "--out", "run"], cwd=tmp_path, faults=faults)
    assert it.codes[1] == 2, it.printed
    assert [line for line in it.printed.splitlines() if str(REFUSED) in line] == [said + str(REFUSED)], it.printed
