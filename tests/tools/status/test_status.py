"""`status` on directories as a run leaves them at various moments."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftmix.common.errors import ConfigError, SFTMixError
from sftmix.tools.status.command import report

HERE = {"pid": os.getpid(), "host": socket.gethostname(), "exit_code": None, "stage": "train"}


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


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def line(text: str, stage: str) -> list[str]:
    return next(row.split() for row in text.splitlines() if row.split()[:1] == [stage])


def test_a_running_stage_shows_progress_and_time_left(tmp_path: Path) -> None:
    finished = ("reference", "confidence", "split")
    run = lay(tmp_path / "r", done=finished, steps={"reference": 50, "train": 40}, total_steps=100)
    with (run / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # the file may be growing
    text = report(run)
    assert text.startswith(f"{run}: running train, pid {os.getpid()} on {socket.gethostname()}\n")
    assert line(text, "reference")[:3] == ["reference", "done", "50"]
    assert line(text, "split") == ["split", "done"]
    assert line(text, "train") == ["train", "running", "40/100", "(40%)", "0.0250", "1.00e-05", "1,234", "0:02:00"]
    assert "baseline" not in text


def test_a_pause_before_a_run_went_on_is_no_part_of_the_time_left(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", steps={"train": 20}, total_steps=1020, started=100.0 + 8 * 3600)
    lines = [json.loads(text) for text in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    later = [{**record, "time": record["time"] + 8 * 3600 * (record["step"] > 10)} for record in lines]
    (run / "train" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in later))
    assert line(report(run), "train")[-1] == "0:33:20"


@pytest.mark.parametrize(("mixed", "shown"), [(7, ["5.0000"]), (0, [])])
def test_mixup_is_shown_where_pairs_were_mixed(tmp_path: Path, mixed: int, shown: list[str]) -> None:
    run = lay(tmp_path / "r", done=("train",), exit_code=0)
    step = {"step": 3, "time": 1.0, "loss": 4.0, "ntp": 3.0, "mixup": 5.0, "mixup_tokens": mixed}
    (run / "train" / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    assert line(report(run), "train") == ["train", "done", "3", "4.0000", "3.0000", *shown]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"doing": "writing the model"}, "running train (writing the model), pid "),
        ({"pid": dead_pid()}, "died in train; the same command continues it"),
        ({"pid": dead_pid(), "host": "elsewhere"}, "running train, pid "),
        ({"exit_code": 0, "pid": dead_pid()}, "finished"),
        ({"exit_code": 3, "message": "rows.json:4: no response"}, "exit code 3 in train: rows.json:4: no response"),
        ({"exit_code": 130, "message": "Stop"}, "exit code 130 in train; the same command continues it: Stop"),
    ],
)
def test_the_first_line_says_how_a_run_is(tmp_path: Path, status: dict[str, Any], words: str) -> None:
    assert report(lay(tmp_path / "r", **status)).startswith(f"{tmp_path / 'r'}: {words}")


def test_directories_that_are_no_runs_do_not_hide_the_others(tmp_path: Path, sftmix) -> None:
    run = lay(tmp_path / "run", exit_code=0)
    done = sftmix("status", str(tmp_path), str(run), str(tmp_path / "missing"))
    assert (done.code, done.out.strip()) == (ConfigError.exit_code, report(run).strip())
    assert done.err.count("is not a run directory") == 2


def test_a_table_shows_its_runs(tmp_path: Path) -> None:
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
    head, *rows = report(table).splitlines()
    running = f"pid {os.getpid()} on {socket.gethostname()}"
    assert head == f"{table}: running B/seed-2, {running}"
    assert [" ".join(row.split()) for row in rows] == [
        "variant seed state steps calibration.ece",
        "A 1 finished 7/7 (100%) 0.1250",
        "B 1 exit code 3 in data",
        "A 2 exit code 143 in train; the same command continues it 5/7 (71%)",
        f"B 2 running train, {running} 2/7 (28%)",
        "A 3 died in train; the same command continues it 3/7 (42%)",
        "B 3 not started",
        "1 of 6 runs finished",
    ]


@pytest.mark.parametrize("text", ["seeds: [1]", "{", "- 1"])
def test_a_table_that_cannot_be_read_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "compare.yaml").write_text(text)
    with pytest.raises(SFTMixError, match=r"compare\.yaml|is not as a run writes it"):
        report(tmp_path)
