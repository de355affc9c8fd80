"""`status`: the progress of a run or a table, from its files alone; it may be on another machine, or finished."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.cli.results import STAGES, at, held_out, say
from sftmix.cli.words import read_words
from sftmix.common.errors import INTERRUPTED, ConfigError, NoSpaceError, SFTMixError, Stopped
from sftmix.common.files import MANIFEST, not_as_written, read_json, read_object
from sftmix.common.names import is_there
from sftmix.config.layers import TABLE, read_yaml

_TAIL_BYTES = 1 << 16
_MIXUP = 5  # the column of the Mixup loss; that of NTP is before it

ABOUT = """Show how far runs are: stages, steps, last loss, time left, and whether the process is alive.
It reads files only, so it works while a run goes on and after it has ended.

  sftmix status runs/first"""

CONTINUED = (INTERRUPTED, Stopped.exit_code, NoSpaceError.exit_code)
"""Exit codes after which the same command continues the run."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")


def main(argv: Sequence[str]) -> None:
    """Print the state of each directory; raise ConfigError for those that are neither runs nor tables."""
    texts, problems = reports(read_words("status", ABOUT, add_options, argv).runs)
    if texts:
        say("\n\n".join(texts), sys.stdout)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def reports(runs: Sequence[str | Path]) -> tuple[list[str], list[SFTMixError]]:
    """Return the state of every run or table, and an error for each directory that is neither, or damaged."""
    found = [_report_or_problem(run) for run in runs]
    told = [text for text in found if isinstance(text, str)]
    return told, [problem for problem in found if isinstance(problem, SFTMixError)]


def _report_or_problem(run: str | Path) -> str | SFTMixError:
    try:
        return report(run)
    except SFTMixError as error:
        return error


def report(run: str | Path) -> str:
    """Return the state of a run directory, or of a table, as text.

    Raises ConfigError if it is neither, DifferenceError where its files are not as a run writes them.
    """
    run = Path(run)
    try:
        return _table(run) if is_there(run / TABLE) else _run(run)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise not_as_written(f"a file of {run}", error) from error


def _run(run: Path) -> str:
    status, summary = _json(run / "STATUS.json"), _json(run / "summary.json")
    if not (status or is_there(run / "config.yaml")):
        raise ConfigError(f"{run} is not a run directory: it has neither STATUS.json nor config.yaml")
    alive = _alive(status)
    rows: list[tuple[str, ...]] = [("stage", "state", "steps", "loss", "NTP", "Mixup", "lr", "tokens/s", "left")]
    for stage in STAGES:
        row = _stage(run, stage, status, running=alive is not False and status.get("exit_code") is None)
        if row:
            rows.append((stage, *row))
    told = list(held_out(summary))
    if any(row[_MIXUP] for row in rows[1:]):
        told.insert(0, "loss = NTP + mu x Mixup, so compare stages by NTP")
    else:
        rows = [(*row[: _MIXUP - 1], *row[_MIXUP + 1 :]) for row in rows]
    return "\n".join([f"{run}: {_headline(status, alive)}", *_aligned(rows), *(f"  {line}" for line in told)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in padded]


def _table(out: Path) -> str:
    """Return the state of a table: one line for each of its runs, those that are planned, too."""
    planned = read_yaml(out / TABLE)
    metric, seeds, variants = planned["metric"], planned["seeds"], list(planned["variants"])
    cells = [(str(variant), f"seed-{seed}") for seed in seeds for variant in variants]
    # Runs that were begun after the file was written, which follows what is finished.
    cells += sorted((p.parent.parent.name, p.parent.name) for p in out.glob("*/seed-*/STATUS.json"))
    rows = [("variant", "seed", "state", "steps", metric)]
    rows += [_cell(out, variant, seed, metric) for variant, seed in dict.fromkeys(cells)]
    status = _json(out / "STATUS.json")
    done = sum(row[2] == "finished" for row in rows)
    progress = f"{done} of {len(rows) - 1} runs finished"
    return "\n".join([f"{out}: {_headline(status, _alive(status), 'run')}; {progress}", *_aligned(rows)])


def _cell(out: Path, variant: str, seed: str, metric: str) -> tuple[str, str, str, str, str]:
    """Return the line of a run in a table: variant, seed, state, steps of the stage it is in, and its figure."""
    run = out / variant / seed
    status, number = _json(run / "STATUS.json"), seed.removeprefix("seed-")
    if not status:
        return variant, number, "-", "", ""
    code, stage = status.get("exit_code"), status.get("stage", "?")
    if code == 0:
        state, stage = "finished", "train"
    elif code is None:
        state = f"{'died in' if _alive(status) is False else 'in'} {stage}"
    else:
        state = f"{'interrupted' if code in CONTINUED else f'exit code {code}'} in {stage}"
    row = _stage(run, stage, status, running=code is None)
    figure = at(_json(run / "summary.json"), metric) if code == 0 else None
    return variant, number, state, row[1] if row else "", _number(figure)


def _headline(status: Mapping[str, Any], alive: bool | None, noun: str = "stage") -> str:
    code, place = status.get("exit_code"), f"pid {status.get('pid', '?')} on {status.get('host', 'this machine')}"
    stage, message = status.get("stage", "?"), status.get("message") or status.get("error")
    why = f": {message}" if message else ""
    if not status:
        return "not started (no STATUS.json)"
    if code == 0:
        return "finished"
    again = "; the same command continues it" if code in CONTINUED and "continues" not in why else ""
    where = "before the first stage" if stage == "start" else f"in {noun} {stage}"
    if code == INTERRUPTED:
        return f"interrupted {where} (exit code {code}){again}"
    if code is not None:
        return f"ended {where} with exit code {code}{why}{again}"
    if alive is None:
        return f"{where}, {place} (cannot be looked up from here)"
    if alive:
        doing = f" ({status['doing']})" if status.get("doing") else ""
        return f"running {noun} {stage}{doing}, {place}"
    return f"died {where}, {place} is gone; the same command continues it"


def _alive(status: Mapping[str, Any]) -> bool | None:
    """Return True if the run's process exists, None if this is unknown (another machine, no pid)."""
    pid = status.get("pid")
    if not isinstance(pid, int) or status.get("host", socket.gethostname()) != socket.gethostname():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stage(run: Path, stage: str, status: Mapping[str, Any], running: bool) -> tuple[str, ...] | None:
    """Return state, steps, losses, learning rate, tokens/s and time left of a stage; None if it has not begun."""
    lines = _last_lines(run / stage / "metrics.jsonl")
    done, current = (run / stage / MANIFEST).exists(), status.get("stage") == stage
    if not (lines or done or current):
        return None
    state = "done" if done else "running" if current and running else "interrupted" if lines or current else "-"
    if not lines:
        return (state, *[""] * 7)
    last = lines[-1]
    step, total = int(last.get("step", 0)), (status.get("total_steps") if current else None) or last.get("total_steps")
    steps = f"{step}/{total} ({100 * step // total}%)" if total else str(step)
    rate = _seconds_per_step([line for line in lines if not running or line["time"] >= status.get("started", 0)])
    left = _duration(rate * (total - step)) if rate and total and step < total and state == "running" else ""
    losses = [last.get("loss"), last.get("ntp"), last.get("mixup") if last.get("mixup_tokens") else None]
    lr, speed = _number(last.get("learning_rate"), "{:.2e}"), _number(last.get("tokens_per_second"), "{:,.0f}")
    return (state, steps, *map(_number, losses), lr, speed, left)


def _seconds_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean over the steps of one process: before these may lie a pause of hours."""
    steps = lines[-1]["step"] - lines[0]["step"] if lines else 0
    return (lines[-1]["time"] - lines[0]["time"]) / steps if steps > 0 else None


def _number(value: Any, form: str = "{:.4f}") -> str:
    return form.format(value) if isinstance(value, int | float) else ""


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is none."""
    return read_json(path) if is_there(path) else {}


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """Read the last records of a JSONL file that may be growing; an incomplete line at either end is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL_BYTES, 0))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    whole = lines[1:] if size > _TAIL_BYTES else lines
    return [
        read_object(line, path, step=int, time=float) for line in whole if line.startswith("{") and line.endswith("}")
    ]
