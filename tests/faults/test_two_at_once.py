"""F13: several processes on one run directory: one trains, the others are turned away; readers see whole files."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sftmix.common.checkpoints import step_path, steps_in
from sftmix.common.files import verify_directory
from sftmix.pipeline.start import export_run
from sftmix.tools.quickstart import make_rows, write_rows
from tests.faults.mines import KillIn, children, itself
from tests.faults.runs import assert_same, words_of
from tests.forked import SIGKILLED, Job, done, ended, start
from tests.tiny import Tiny

AWAY = 15.0
"""Seconds within which a process is turned away."""


def files(run: Path) -> set[str]:
    return {str(p.relative_to(run)) for p in run.rglob("*")}


def race(small: Tiny, whole: Path, place: Path, runs: int) -> float:
    """Start so many at once; return the seconds from its start that the slowest of those turned away took."""
    began, jobs, slowest = list[float](), list[Job](), 0.0
    for number in range(runs):
        began.append(time.monotonic())
        jobs.append(start(words_of(small), cwd=place, log=f"printed-{number}.txt"))
    waiting = set(range(runs))
    while waiting:
        for number in [number for number in waiting if not jobs[number].processes[0].is_alive()]:
            waiting.remove(number)
            if jobs[number].processes[0].exitcode == 5:
                slowest = max(slowest, time.monotonic() - began[number])
        time.sleep(0.01)
    assert sorted(job.processes[0].exitcode or 0 for job in jobs) == [0, *[5] * (runs - 1)]
    for job in jobs:
        assert job.processes[0].exitcode == 0 or "another process is using run" in job.printed
    assert_same(place / "run", whole)
    assert files(place / "run") == files(whole)
    return slowest


@pytest.mark.slow
def test_one_of_three_trains(small, whole, tmp_path, record_property):
    slowest = race(small, whole, tmp_path, 3)
    assert slowest < AWAY
    record_property("F13", f"1 of 3 trained, the others exit 5 within {slowest:.1f} s; equal, no file more")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("runs", "tries"), [(2, 20), (8, 20)])
def test_one_of_many_trains_each_time(small, whole, tmp_path, runs, tries, record_property):
    times = []
    for number in range(tries):
        place = tmp_path / str(number)
        place.mkdir()
        times.append(race(small, whole, place, runs))
    assert max(times) < AWAY
    record_property("F13", f"{tries}/{tries}: 1 of {runs} trained, the others exit 5 within {max(times):.1f} s; equal")


@pytest.mark.slow
def test_a_reader_sees_whole_checkpoints(small, whole, tmp_path, record_property):
    job, looked = start(words_of(small), cwd=tmp_path), 0
    while job.processes[0].is_alive():
        for stage in ("reference", "train"):
            directory = tmp_path / "run" / stage / "checkpoints"
            for step in steps_in(directory)[:1]:  # the newest, which is not about to be removed
                problem = verify_directory(step_path(directory, step))
                assert problem is None or steps_in(directory)[0] != step, problem
                looked += 1
        time.sleep(0.002)
    assert job.wait() == [0]
    assert looked > 10
    record_property("F13", f"a reader beside a run looked {looked} times: the newest checkpoint was always valid")


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True])
def test_exports_beside_a_run_that_prunes(small, tmp_path, best, record_property):
    """Each save removes the checkpoint before: an export that has just chosen it takes the next one."""
    run, exports = tmp_path / "run", 0
    saving = ("--checkpoint.every", "1", "--checkpoint.keep", "1", "--checkpoint.keep_best", "true")
    words = [
        *words_of(small, "--training.epochs", "20", "--reference.training.epochs", "1"),
        *saving,
        "--callbacks",
        "Evaluate",
        "--callbacks.every",
        "1",
    ]
    job = start(words, cwd=tmp_path)
    while job.processes[0].is_alive():
        if steps_in(run / "train" / ("best" if best else "checkpoints")):
            export_run(run, tmp_path / f"model-{exports}", best=best)
            exports += 1
    assert job.wait() == [0], job.printed
    assert exports > 5
    assert all(load_file(tmp_path / f"model-{number}" / "model.safetensors") for number in range(exports))
    record_property(
        "F13", f"{exports} exports {'of the best weights ' * best}beside a run that saves at each of 80 steps"
    )


# ------------------------------------------------------------------------------------------- processes that are left


def itself_alone() -> list[int]:
    """This process; its workers, which stay, are written down."""
    Path("workers").write_text(" ".join(map(str, children(os.getpid()))))
    return itself()


@pytest.mark.slow
def test_workers_that_outlive_a_killed_run_keep_no_lock(small, tmp_path, record_property):
    """Workers of a pool wait for ever for a process that was killed: neither its directory nor its cache is theirs."""
    many = replace(small, train=tmp_path / "rows.jsonl")
    write_rows(many.train, make_rows(n=2000, seed=2))
    words = ["split", *many.options, "--splitter", "RandomSplit", "--out", "run"]
    words += ["--data.num_proc", "2", "--data.cache_dir", "cache"]
    it = ended(words, cwd=tmp_path, faults=[KillIn("data/tokenise.py", "tokenised", call=2, whom=itself_alone)])
    assert it.code == SIGKILLED, it.printed
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    try:
        assert list(tmp_path.glob("cache/.*.lock"))
        assert all(Path(f"/proc/{pid}").exists() for pid in workers)
        done(words, cwd=tmp_path)
        assert not list(tmp_path.glob("cache/.*.lock"))
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2
    record_property("F13", "killed while it tokenised in two processes, which stay: the same command goes on")
