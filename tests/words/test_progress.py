"""The progress of work: plain lines where stderr is no terminal, one live line where it is."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from sftmix.words.progress import LogLines, progress_bar
from tests.tiny import ROOT, metrics
from tests.tiny import sftmix as command

pytestmark = pytest.mark.long

LINE = re.compile(
    r"\d\d:\d\d:\d\d (?P<stage>\w+) (?P<step>\d+)/(?P<total>\d+) \((?P<percent>\d+)%\), "
    r"(?:loss (?P<loss>[\d.]+)|ntp (?P<ntp>[\d.]+), mixup (?P<mixup>[\d.]+)), (?P<speed>[\d,]+) tokens/s, "
    r"(?:\d+:)?\d\d:\d\d left"
)


# ---------------------------------------------------------------------------------------------- when a line is due


def told(capsys: pytest.CaptureFixture[str], seconds: float, updates: int, **options) -> list[int]:
    """The updates (from 1) with a line, for updates that take so many seconds each; of 1000 where no total is given."""
    now = [0.0]
    with progress_bar("train", **{"total": 1000, "unit": "step", **options}) as lines:
        assert isinstance(lines, LogLines)
        lines._time, lines.start_t, lines.last_print_t = (lambda: now[0]), 0.0, 0.0
        for _ in range(updates):
            now[0] += seconds
            lines.update()
    return [int(re.split(r"[/s]", line.split(" ")[2])[0]) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_due_after_a_hundredth_and_ten_seconds(capsys):
    assert told(capsys, 0.03125, 1000) == [1, *range(321, 1000, 320), 1000]
    assert told(capsys, 40.0, 1000) == [*range(1, 1000, 10), 1000]  # a run of any length leaves about a hundred


def test_an_interrupted_stage_tells_where_it_ended_and_a_resumed_one_where_it_begins(capsys):
    assert told(capsys, 0.5, 7) == [1, 7]
    assert told(capsys, 0.5, 7, done=990) == [991, 997]


def test_short_work_and_work_inside_other_work_tell_little(capsys):
    assert told(capsys, 0.0009, 1000, delay=1) == []
    assert told(capsys, 0.002, 1000, delay=1) == [500, 1000]
    assert told(capsys, 0.0078125, 1000, leave=False) == []
    assert told(capsys, 0.125, 1000, leave=False) == [250, 500, 750, 1000]
    assert told(capsys, 1.0, 100, total=None) == [1, *range(11, 100, 10), 100]


def test_tqdms_own_switch_is_heard(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress_bar("train", total=2, unit="step") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unit", [" batches", " examples", " rows", " documents", " answers", " texts"])
@pytest.mark.parametrize("terminal", [False, True])
def test_slow_work_has_a_rate_that_can_be_read(unit, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for total in (100, None):
        bar = progress_bar("scoring", total=total, unit=unit, leave=True)
        bar._time = lambda bar=bar: bar.start_t + 2.87 * bar.n
        bar.n = 20
        assert f" 0.35{unit}/s" in str(bar)
        bar.close()


def test_rates_and_times_left_are_those_of_this_process(capsys):
    now = [0.0]
    lines = progress_bar("Tokenising", total=100, unit=" rows", done=40)
    lines._time, lines.start_t = (lambda: now[0]), 0.0
    now[0] = 10.0
    lines.update(20)
    now[0] = 60.0
    lines.update(10)
    lines.close()
    shown = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == [
        "Tokenising 60/100 (60%),  2.00 rows/s, 00:20 left",
        "Tokenising 70/100 (70%),  0.50 rows/s, 01:00 left",
    ]


# ----------------------------------------------------------------------------------------------- of real commands


@pytest.mark.slow
def test_a_log_file_gets_few_plain_lines(tiny, tmp_path):
    """stderr is a pipe; the figures of a line are those of its step in metrics.jsonl."""
    run = tmp_path / "run"
    done = command("run", *tiny.options, "--training.max_steps", "60", "--out", str(run))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for stage, losses in (("reference", ["loss"]), ("train", ["ntp", "mixup"])):
        found = [LINE.fullmatch(line) for line in lines if re.match(rf"\S+ {stage} ", line)]
        assert all(found), lines
        logged = metrics(run, stage)
        assert 2 <= len(found) <= 22
        assert [int(found[k]["step"]) for k in (0, -1)] == [1, 60]
        for line in found:
            step = logged[int(line["step"]) - 1]
            assert [line[name] for name in losses] == [f"{step[name]:.4f}" for name in losses]
            assert line["speed"] == f"{step['tokens_per_second']:,.0f}"
    others = [line for line in lines if not LINE.fullmatch(line)]
    assert not [line for line in others if "it/s" in line or "%|" in line], "a library has a bar of its own"


def in_terminal(*words: str) -> str:
    """What a command writes on stderr where that is a terminal of 100 columns."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(words, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(mine, 1 << 16)
        except OSError:  # the other end is closed (Linux)
            part = b""
        if not part:
            break
        written += part
    os.close(mine)
    assert process.wait() == 0, written
    return written.decode().replace("\r\n", "\n")


INNER = """
import time
from sftmix.words.progress import progress_bar
with progress_bar("outer", total=2, unit="step", rate="{postfix}") as outer:
    outer.update()
    with progress_bar("inner", total=3, unit="batch", leave=False) as inner:
        for _ in range(3):
            time.sleep(0.6)
            inner.update()
    outer.set_postfix_str("loss 1.5", refresh=False)
    outer.update()
"""


def test_work_inside_other_work_takes_over_its_line():
    written = in_terminal(sys.executable, "-c", INNER)
    assert written.count("\n") == 1
    assert written.endswith("\n")
    assert "\x1b[A" not in written
    assert re.search(r"\router: +0%.*\rinner: +67%.*\r +\r.*\router: 100%.*2/2 \[00:00 left, loss 1.5\]", written)
