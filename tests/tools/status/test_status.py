"""`status` on directories as a run leaves them at various moments."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sftmix.disk.tables import write_dynamics
from sftmix.tools.status.command import look_at, shown
from sftmix.types import TrainingDynamics
from sftmix.words.errors import ConfigError

HERE = {"pid": os.getpid(), "host": socket.gethostname(), "exit_code": None, "stage": "train", "updated": time.time()}
HERE["created"] = psutil.Process().create_time()


def lay(run: Path, *, done: tuple[str, ...] = (), steps: dict[str, int] | None = None, **status: Any) -> Path:
    """A run directory with STATUS.json, finished stages and metrics: 2 seconds per step, loss 1/step."""
    run.mkdir(parents=True)
    (run / "STATUS.json").write_text(json.dumps({**HERE, **status}))
    for stage in done:
        (run / stage).mkdir()
        (run / stage / "MANIFEST.json").write_text('{"files": {}}')
    for stage, last in (steps or {}).items():
        (run / stage).mkdir(exist_ok=True)
        records = [
            {"step": s, "time": 100 + 2.0 * s, "loss": 1 / s, "learning_rate": 1e-5, "tokens_per_second": 1234.5}
            for s in range(1, last + 1)
        ]
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def report(run: Path) -> str:
    return shown(look_at(run))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def cells(text: str) -> list[str]:
    return [" ".join(row.replace("|", " ").split()) for row in text.splitlines()]


def line(text: str, stage: str) -> str:
    return next(row for row in cells(text) if row.startswith(stage))


def test_a_running_stage_shows_progress_and_time_left(tmp_path):
    finished = ("reference", "confidence", "split")
    run = lay(tmp_path / "r", done=finished, steps={"reference": 50, "train": 40}, total_steps=100)
    with (run / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # the file may be growing
    text = report(run)
    assert text.startswith(f"{run}: running train, pid {os.getpid()} on {socket.gethostname()}\n")
    assert line(text, "reference").startswith("reference done 50 ")
    assert line(text, "split") == "split done"
    assert line(text, "train") == "train running 40/100 (40%) 0.0250 1.00e-05 1,234 0:02:00"
    assert "baseline" not in text


def test_a_pause_before_a_run_went_on_is_no_part_of_the_time_left(tmp_path):
    run = lay(tmp_path / "r", steps={"train": 20}, total_steps=1020, started=100.0)
    file = run / "train" / "metrics.jsonl"
    file.write_text('{"step": 0, "time": -9000.0}\n' + file.read_text())
    assert line(report(run), "train").endswith(" 0:33:20")


def test_mixup_is_shown_where_pairs_were_mixed(tmp_path):
    run, step = lay(tmp_path / "r", done=("train",), exit_code=0), {"step": 3, "loss": 4.0, "ntp": 3.0, "mixup": 5.0}
    for mixed, mixup in ((7, " 5.0000"), (0, "")):
        (run / "train" / "metrics.jsonl").write_text(json.dumps({**step, "mixup_tokens": mixed}) + "\n")
        assert line(report(run), "train") == f"train done 3 4.0000 3.0000{mixup}"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"doing": "writing the model"}, "running train (writing the model), pid "),
        # The process of this number is another one: it began later, or, as in a container, before.
        ({"created": time.time() - 1e6, "updated": time.time() - 1e6}, "died in train"),
        ({"created": time.time() - 1e6}, "died in train"),
        ({"pid": 1}, "died in train"),
        (
            {"exit_code": 143, "message": "Stopped: stopped by a signal after step 75; the same command continues"},
            "exit code 143 in train; the same command continues it: stopped by a signal after step 75\n",
        ),
        (
            {"exit_code": 3, "message": "DataError: rows.json:4: no response"},
            "exit code 3 in train: rows.json:4: no response",
        ),
        ({"exit_code": 3, "message": "rows.json:4: no response"}, "exit code 3 in train: rows.json:4: no response"),
        ({"exit_code": 130, "message": "Stop"}, "exit code 130 in train; the same command continues it: Stop"),
    ],
)
def test_the_first_line_says_how_a_run_is(tmp_path, status, words):
    assert report(lay(tmp_path / "r", **status)).startswith(f"{tmp_path / 'r'}: {words}")


@pytest.mark.parametrize(
    ("silent", "heard", "left"), [(9, "0:00:", " 0:02:00"), (50_000, "13:53:", ""), (-90, "0:00:01", " 0:02:00")]
)
def test_of_a_run_on_another_machine_it_is_said_when_it_wrote_last(tmp_path, silent, heard, left):
    """Whether its process is alive cannot be looked up, and the clock there may be ahead."""
    status = {"pid": dead_pid(), "host": "elsewhere", "updated": time.time() - silent, "total_steps": 100}
    text = report(lay(tmp_path / "r", steps={"train": 40}, **status))
    assert text.startswith(f"{tmp_path / 'r'}: running train, pid {status['pid']} on elsewhere, last heard of {heard}")
    assert line(text, "train") == f"train running 40/100 (40%) 0.0250 1.00e-05 1,234{left}"


def test_a_killed_run_that_nobody_has_waited_for_is_not_running(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    status = {"pid": child.pid, "created": psutil.Process(child.pid).create_time()}
    assert " running train, pid " in report(lay(tmp_path / "a", **status))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and keeps its number
    assert " died in train" in report(lay(tmp_path / "b", **status))
    child.communicate()


def test_a_directory_that_is_no_run_does_not_hide_the_others(tmp_path, sftmix):
    run = lay(tmp_path / "run", exit_code=0)
    done = sftmix("status", str(tmp_path), str(run))
    assert (done.code, done.out.strip()) == (ConfigError.exit_code, report(run).strip())
    assert "is not a run directory" in done.err


def test_a_table_shows_its_runs(tmp_path):
    """One line each: finished, failed, running, interrupted, died, not begun."""
    table = lay(tmp_path / "t", stage="B/seed-2")
    (table / "compare.yaml").write_text("metric: calibration.ece\nseeds: [1, 2, 3]\nvariants: {A: {}, B: {}}\n")
    counts = {"step": 7, "total_steps": 7}
    first = lay(table / "A" / "seed-1", exit_code=0, done=("train",), steps={"train": 7}, **counts)
    (first / "summary.json").write_text(json.dumps({"calibration": {"ece": 0.125}, "eval_nll_after": 3.0}))
    lay(table / "B" / "seed-1", stage="data", exit_code=3, message="no rows")
    lay(table / "A" / "seed-2", exit_code=143, steps={"train": 5}, **counts)
    lay(table / "B" / "seed-2", steps={"train": 2}, **counts)
    lay(table / "A" / "seed-3", pid=dead_pid(), steps={"train": 3}, **counts)
    running = f"pid {os.getpid()} on {socket.gethostname()}"
    head, names, _, *rows = cells(report(table))
    assert [head, names, *rows] == [
        f"{table}: running B/seed-2, {running}",
        "variant seed state steps calibration.ece",
        "A 1 finished 7 0.1250",
        "B 1 exit code 3 in data",
        "A 2 exit code 143 in train; the same command continues it 5/7 (71%)",
        f"B 2 running train, {running} 2/7 (28%)",
        "A 3 died in train; the same command continues it 3/7 (42%)",
        "B 3 not started",
        "1 of 6 runs finished",
    ]


def test_a_table_that_is_tested_on_the_fit_shows_it(tmp_path):
    """It is in no summary.json."""
    table = lay(tmp_path / "t", stage="A/seed-1")
    (table / "compare.yaml").write_text("metric: fit\nseeds: [1]\nvariants: {A: {}, B: {}}\n")
    lay(table / "A" / "seed-1", exit_code=0, done=("train",), steps={"train": 7}, total_steps=7)
    sums, tokens = np.array([[9.0, 2.0], [9.0, 5.0]]), np.array([1, 4])
    dynamics = TrainingDynamics(["a", "b"], np.array([1, 2]), sums, tokens, np.zeros((2, 2), dtype=np.int64))
    write_dynamics(table / "A" / "seed-1" / "train" / "sample.parquet", dynamics)
    assert cells(report(table))[1::2] == [
        "variant seed state steps fit",
        "A 1 finished 7 1.4000",
        "1 of 2 runs finished",
    ]


def test_json_has_the_same_state(tmp_path, sftmix):
    run = lay(tmp_path / "r", done=("reference",), steps={"reference": 50, "train": 40}, total_steps=100)
    table = lay(tmp_path / "t", stage="A/seed-1", exit_code=143, message="Stopped: now")
    (table / "compare.yaml").write_text("metric: eval_nll_after\nseeds: [1]\nvariants: {A: {}}\n")
    lay(table / "A" / "seed-1", exit_code=143, steps={"train": 5}, total_steps=7)
    done = sftmix("status", str(run), str(table), "--json")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)
    assert (first["run"], first["status"]["pid"]) == (str(run), os.getpid())
    assert first["state"].startswith("running train, pid ")
    reference, train = first["rows"]
    assert (reference["stage"], reference["state"], reference["steps"]) == ("reference", "done", 50)
    assert (train["steps"], train["loss"], train["lr"], train["left"]) == ("40/100 (40%)", 1 / 40, 1e-5, "0:02:00")
    assert (second["status"]["exit_code"], second["notes"]) == (143, ["0 of 1 run finished"])
    (cell,) = second["rows"]
    assert (cell["variant"], cell["seed"], cell["eval_nll_after"], cell["steps"]) == ("A", 1, None, "5/7 (71%)")
    done = sftmix("status", str(tmp_path), str(run), "--json")
    assert (done.code, [look["run"] for look in json.loads(done.out)]) == (ConfigError.exit_code, [str(run)])
