"""`status` on directories as a run leaves them at various moments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftmix.common.errors import ConfigError, SFTMixError
from sftmix.tools.status.command import report, reports


def lay(run: Path, *, status: dict[str, Any], done: tuple[str, ...] = (), steps: dict[str, int] | None = None) -> Path:
    """A run directory with STATUS.json, finished stages and metrics: 2 seconds per step, loss 1/step."""
    run.mkdir()
    (run / "STATUS.json").write_text(json.dumps(status))
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
    status = {"stage": "train", "step": 40, "total_steps": 100, "exit_code": None, "pid": os.getpid()}
    run = lay(
        tmp_path / "r", status=status, done=("reference", "confidence", "split"), steps={"reference": 50, "train": 40}
    )
    text = report(run)
    assert f"running stage train, pid {os.getpid()}" in text
    assert line(text, "reference")[:3] == ["reference", "done", "50"]
    assert line(text, "split") == ["split", "done"]
    assert line(text, "train") == ["train", "running", "40/100", "(40%)", "0.0250", "1.00e-05", "1,234", "00:02:00"]
    assert "baseline" not in text


def test_a_pause_before_a_run_went_on_is_no_part_of_the_time_left(tmp_path: Path) -> None:
    status = {"stage": "train", "step": 20, "total_steps": 1020, "exit_code": None, "pid": os.getpid()}
    run = lay(tmp_path / "r", status={**status, "started": 100.0 + 8 * 3600}, steps={"train": 20})
    lines = [json.loads(text) for text in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    later = [{**record, "time": record["time"] + 8 * 3600 * (record["step"] > 10)} for record in lines]
    (run / "train" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in later))
    assert line(report(run), "train")[-1] == "00:33:20"


def test_after_the_last_step_it_says_what_is_done_and_no_time(tmp_path: Path) -> None:
    status = {"stage": "train", "step": 39, "total_steps": 40, "exit_code": None, "pid": os.getpid()}
    run = lay(tmp_path / "r", status={**status, "doing": "writing the model"}, steps={"train": 40})
    text = report(run)
    assert f"running stage train (writing the model), pid {os.getpid()}" in text
    assert line(text, "train") == ["train", "running", "40/40", "(100%)", "0.0250", "1.00e-05", "1,234"]


def test_ntp_and_mixup_are_told_apart_where_pairs_were_mixed(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", status={"stage": "train", "exit_code": 0}, done=("train",), steps={"baseline": 3})
    step = {"step": 3, "time": 1.0, "loss": 4.0, "ntp": 3.0, "mixup": 5.0, "tokens_per_second": 9}
    (run / "train" / "metrics.jsonl").write_text(json.dumps({**step, "mixup_tokens": 7}) + "\n")
    assert line(report(run), "train") == ["train", "done", "3", "4.0000", "3.0000", "5.0000", "9"]
    assert line(report(run), "stage") == ["stage", "state", "steps", "loss", "NTP", "Mixup", "lr", "tokens/s", "left"]
    (run / "train" / "metrics.jsonl").write_text(json.dumps({**step, "mixup": 0.0, "mixup_tokens": 0}) + "\n")
    assert line(report(run), "train") == ["train", "done", "3", "4.0000", "9"]
    assert "Mixup" not in report(run)


def test_a_dead_process_is_told_from_a_living_one(tmp_path: Path) -> None:
    status = {"stage": "train", "step": 3, "total_steps": 9, "exit_code": None, "pid": dead_pid()}
    text = report(lay(tmp_path / "r", status=status, steps={"train": 3}))
    assert "died in stage train" in text
    assert "is gone; the same command continues it" in text
    assert line(text, "train")[:4] == ["train", "interrupted", "3/9", "(33%)"]


def test_a_process_of_another_machine_is_not_looked_up(tmp_path: Path) -> None:
    status = {"stage": "train", "step": 3, "total_steps": 9, "exit_code": None, "pid": dead_pid(), "host": "elsewhere"}
    assert "on elsewhere (cannot be looked up from here)" in report(lay(tmp_path / "r", status=status))


@pytest.mark.parametrize(("code", "words"), [(0, "finished"), (3, "exit code 3: rows.json:4"), (143, "continues it")])
def test_an_ended_run_says_how(tmp_path: Path, code: int, words: str) -> None:
    message = "rows.json:4: no response" if code else ""
    status = {"stage": "train", "step": 2, "total_steps": 2, "exit_code": code, "message": message, "pid": dead_pid()}
    assert words in report(lay(tmp_path / "r", status=status, done=("train",), steps={"train": 2}))


def test_a_finished_run_shows_its_held_out_loss(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", status={"stage": "train", "exit_code": 0}, done=("train",), steps={"train": 2})
    (run / "summary.json").write_text(json.dumps({"eval_nll_before": 5.0, "eval_nll_after": 3.25}))
    assert "held-out NLL per response token (lower is better): before 5.0000, after 3.2500" in report(run)


def test_a_growing_file_may_end_in_half_a_line(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", status={"stage": "train", "total_steps": 9, "exit_code": None}, steps={"train": 4})
    with (run / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert line(report(run), "train")[2] == "4/9"


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", status={"stage": "train", "total_steps": 6000, "exit_code": None}, steps={"train": 3000})
    assert line(report(run), "train")[2:4] == ["3000/6000", "(50%)"]


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        report(tmp_path)
    with pytest.raises(ConfigError, match="is not a run directory"):
        report(tmp_path / "missing")


def test_directories_that_are_no_runs_do_not_hide_the_others(tmp_path: Path) -> None:
    lay(tmp_path / "run", status={"stage": "train", "exit_code": 0})
    told, problems = reports([tmp_path / "a", tmp_path / "run", tmp_path / "b"])
    assert told == [report(tmp_path / "run")]
    assert [str(problem).split(" is not a run")[0] for problem in problems] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]


def test_an_interrupted_run_says_that_it_goes_on(tmp_path: Path) -> None:
    status = {"stage": "train", "step": 2, "total_steps": 4, "exit_code": 130, "message": "KeyboardInterrupt: "}
    told = report(lay(tmp_path / "r", status=status, steps={"train": 2})).splitlines()[0]
    assert told.endswith("interrupted in stage train (exit code 130); the same command continues it")


def test_a_table_shows_its_runs(tmp_path: Path) -> None:
    """One line each: finished, failed, running, interrupted, begun after the table was planned, not begun."""
    table = lay(tmp_path / "t", status={"stage": "B/seed-2", "exit_code": None, "pid": os.getpid()})
    plan = "metric: calibration.ece\nseeds: [1, 2]\nvariants: {A: {}, B: {}}\n"
    (table / "compare.yaml").write_text(plan)
    for variant in "ABC":
        (table / variant).mkdir()
    ended = {"stage": "train", "exit_code": 0, "step": 7, "total_steps": 7}
    first = lay(table / "A" / "seed-1", status=ended, done=("train",), steps={"train": 7})
    (first / "summary.json").write_text(json.dumps({"calibration": {"ece": 0.125}, "eval_nll_after": 3.0}))
    lay(table / "B" / "seed-1", status={"stage": "data", "exit_code": 3, "message": "no rows"})
    lay(table / "A" / "seed-2", status={**ended, "exit_code": 143}, steps={"train": 5})
    lay(table / "B" / "seed-2", status={**ended, "exit_code": None, "pid": os.getpid()}, steps={"train": 2})
    lay(table / "C" / "seed-1", status={**ended, "exit_code": None, "pid": dead_pid()}, steps={"train": 3})
    (table / "compare.yaml").write_text(plan.replace("[1, 2]", "[1, 2, 3]"))
    head, *rows = report(table).splitlines()
    assert head == f"{table}: running run B/seed-2, pid {os.getpid()} on this machine; 1 of 7 runs finished"
    assert [" ".join(row.split()) for row in rows] == [
        "variant seed state steps calibration.ece",
        "A 1 finished 7/7 (100%) 0.1250",
        "B 1 exit code 3 in data",
        "A 2 interrupted in train 5/7 (71%)",
        "B 2 in train 2/7 (28%)",
        "A 3 -",
        "B 3 -",
        "C 1 died in train 3/7 (42%)",
    ]
    assert report(first).startswith(f"{first}: finished\n  stage ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seeds: [1]", "a file of .* is not as a run writes it"),
        ("{", r"cannot read .*compare\.yaml"),
        ("- 1", r"compare\.yaml is not a"),
    ],
)
def test_a_table_that_cannot_be_read_is_a_wrong_argument(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "compare.yaml").write_text(text)
    with pytest.raises(SFTMixError, match=words):
        report(tmp_path)
