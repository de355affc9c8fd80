"""F13: several processes on one run directory: one trains, the others are turned away; readers see whole files."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sftmix.disk.files import step_path, steps_in, verify_directory
from sftmix.tools.quickstart import make_rows, write_jsonl
from sftmix.tools.runs.export import export_run
from tests.faults.mines import KillIn
from tests.faults.runs import assert_same, words_of
from tests.forked import SIGKILLED, done, ended, start
from tests.tiny import Tiny, contents

AWAY = 15.0
"""Seconds within which processes are turned away."""


def race(small: Tiny, whole: Path, place: Path, runs: int) -> None:
    """Start so many at once, of which all but one are turned away in time."""
    place.mkdir()
    began = time.monotonic()
    jobs = [start(words_of(small), cwd=place, log=f"printed-{number}.txt") for number in range(runs)]
    while sum(job.processes[0].is_alive() for job in jobs) > 1:
        assert time.monotonic() - began < AWAY
        time.sleep(0.01)
    for job in jobs:
        job.processes[0].join()
    assert sorted(job.processes[0].exitcode or 0 for job in jobs) == [0, *[5] * (runs - 1)]
    for job in jobs:
        assert job.processes[0].exitcode == 0 or "another process is using run" in job.printed
    assert_same(place / "run", whole)
    assert contents(place / "run").keys() == contents(whole).keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "tries"), [(3, 1), *(pytest.param(runs, 20, marks=pytest.mark.long) for runs in (2, 8))]
)
def test_one_of_many_trains(small, whole, tmp_path, runs, tries):
    for number in range(tries):
        race(small, whole, tmp_path / str(number), runs)


@pytest.mark.slow
def test_a_reader_sees_whole_checkpoints(small, whole, tmp_path):
    job, looked = start(words_of(small), cwd=tmp_path), 0
    while job.processes[0].is_alive():
        for stage in ("reference", "train"):
            directory = tmp_path / "run" / stage / "checkpoints"
            for step in steps_in(directory)[:1]:  # the newest, which is not about to be removed
                problem = verify_directory(step_path(directory, step), within=directory.parent)
                assert problem is None or steps_in(directory)[0] != step, problem
                looked += 1
        time.sleep(0.002)
    assert job.wait() == [0]
    assert looked > 10


@pytest.mark.slow
@pytest.mark.parametrize("best", [pytest.param(False, marks=pytest.mark.long), True])
def test_exports_beside_a_run_that_prunes(small, tmp_path, best):
    """Each save removes the checkpoint before: an export that has just chosen it takes the next one."""
    run, exports = tmp_path / "run", 0
    words = words_of(small, "--training.epochs", "20", "--reference.training.epochs", "1", "--callbacks", "Evaluate")
    words += ["--callbacks.every", "1", "--checkpoint.every", "1", "--checkpoint.keep", "1"]
    words += ["--checkpoint.keep_best", "true"]
    job = start(words, cwd=tmp_path)
    while job.processes[0].is_alive():
        if steps_in(run / "train" / ("best" if best else "checkpoints")):
            export_run(run, tmp_path / f"model-{exports}", best=best)
            exports += 1
    assert job.wait() == [0], job.printed
    assert exports > 5
    assert all(load_file(tmp_path / f"model-{number}" / "model.safetensors") for number in range(exports))


# ------------------------------------------------------------------------------------------- processes that are left


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_was_killed_while_it_tokenised_keeps_no_lock(small, tmp_path):
    many = replace(small, train=tmp_path / "rows.jsonl")
    write_jsonl(many.train, make_rows(n=2000, seed=2))
    words = ["split", *many.options, "--splitter", "RandomSplit", "--out", "run", "--data.cache_dir", "cache"]
    it = ended(words, cwd=tmp_path, faults=[KillIn("data/tokenise.py", "tokenise", call=2)])
    assert it.code == SIGKILLED, it.printed
    assert list(tmp_path.glob("cache/.*.lock"))
    assert list(tmp_path.glob("cache/.tmp-*"))  # half a copy of the rows
    done(words, cwd=tmp_path)
    assert not list(tmp_path.glob("cache/.*"))
