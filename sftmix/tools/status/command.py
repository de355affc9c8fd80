"""`status`: the progress of a run or a table, from its files alone; it may be on another machine, or finished."""

import json
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sftmix.cli.say import say
from sftmix.config.read import read_yaml
from sftmix.disk.files import MANIFEST, TABLE, naming_damage, read_steps
from sftmix.disk.places import is_there
from sftmix.disk.regular import keep_within
from sftmix.tools.runs.output import markdown_table
from sftmix.tools.runs.read import read_json_if_there, stages_in
from sftmix.tools.runs.results import at, fit_of, held_out
from sftmix.words.errors import INTERRUPTED, ConfigError, NoSpaceError, SFTMixError, Stopped
from sftmix.words.shown import counted

ABOUT = """Show how far runs are: stages, steps, last loss, time left, and whether the process is alive.
It reads files only, so it works while a run goes on and after it has ended.

  sftmix status runs/first
  sftmix status runs/first runs/second --json"""

CONTINUED = (None, INTERRUPTED, Stopped.exit_code, NoSpaceError.exit_code)
"""Exit codes after which the same command continues the run; a killed process has null."""

_FORMS = {
    "loss": "{:.4f}",
    "NTP": "{:.4f}",
    "Mixup": "{:.4f}",
    "lr": "{:.2e}",
    "tokens/s": "{:,.0f}",
}
"""Columns of a stage's figures, and how people read them."""
_COLUMNS = ["stage", "state", "steps", *_FORMS, "left"]
_SAID = re.compile(r"^\w+: (?:stopped: )?|; the same command continues\b.*")
"""What the first line says of an error itself: its class, and that the same command continues the run."""


@dataclass
class Options:
    runs: list[str]
    """RUN: run directories"""
    _: KW_ONLY
    json: bool = False
    """print JSON, a list with an object for each directory"""


def main(args: Options) -> None:
    """Print the state of each directory; raise the error of those that are neither runs nor tables, or damaged."""
    problems = list[SFTMixError]()
    found = []
    for run in args.runs:
        try:
            found.append(look_at(Path(run)))
            if not args.json:
                say(shown(found[-1]) + "\n", sys.stdout)
        except SFTMixError as error:
            problems.append(error)
    if args.json:
        say(json.dumps(found, indent=1), sys.stdout)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def look_at(run: Path) -> dict[str, Any]:
    """Return the state of a run directory, or of a table with its runs, also those that are only planned.

    run, state  the directory as it was given, and its state in words
    status      its STATUS.json, or {}
    rows        of a run the stages that have begun, of a table its runs; each a mapping, column -> value
    notes       how far the whole is, in words

    Raises ConfigError if it is neither, DifferenceError if its files are not as a run writes them.
    """
    keep_within(run)
    with naming_damage(f"a file of {run}"):
        status = read_json_if_there(run / "STATUS.json")
        if is_there(run / TABLE):
            plan = read_yaml(run / TABLE)
            metric = plan["metric"]
            rows = []
            for seed in plan["seeds"]:
                for variant in map(str, plan["variants"]):  # 0.4 is a number in YAML
                    cell = run / variant / f"seed-{seed}"
                    of_cell = read_json_if_there(cell / "STATUS.json")
                    row = {"variant": variant, "seed": seed, "state": _state(of_cell)}
                    row["steps"] = _stage(cell, of_cell["stage"], of_cell).get("steps") if of_cell else None
                    # Of what a table may be tested on, fit alone is in no summary.json.
                    figures = dict(fit_of(cell)) if metric == "fit" else read_json_if_there(cell / "summary.json")
                    rows.append({**row, metric: at(figures, metric)})
            finished = sum(row["state"] == "finished" for row in rows)
            notes = [f"{finished} of {counted(len(rows), 'run')} finished"]
        elif status or is_there(run / "config.yaml"):
            rows = [row for stage in stages_in(run) if (row := _stage(run, stage, status))]
            notes = held_out(read_json_if_there(run / "summary.json"))
        else:
            raise ConfigError(f"{run} is not a run directory: it has neither STATUS.json nor config.yaml")
    return {"run": str(run), "state": _state(status), "status": status, "rows": rows, "notes": notes}


def shown(look: Mapping[str, Any]) -> str:
    """Return what `look_at` returned as text: one line, a table, and how far the whole is."""
    rows = look["rows"]
    columns = [*rows[0]] if rows else _COLUMNS
    cells = [[_cell(value, _FORMS.get(name, "{:.4f}")) for name, value in row.items()] for row in rows]
    why = _SAID.sub("", str(look["status"].get("message") or ""))
    first = f"{look['run']}: {look['state']}{why and ': '}{why}"
    return "\n".join([first, markdown_table([columns, *cells]), *look["notes"]])


def _state(status: Mapping[str, Any]) -> str:
    """Return how a run ended, or which process it is, and whether the same command continues it."""
    if not status:
        return "not started"
    code, stage = status["exit_code"], status["stage"]
    if code == 0:
        return "finished"
    if _may_run(status):
        doing = f" ({status['doing']})" if status.get("doing") else ""
        silent = _silence(status)
        heard = f", last heard of {timedelta(seconds=round(silent))} ago" if silent else ""
        return f"running {stage}{doing}, pid {status['pid']} on {status['host']}{heard}"
    state = f"died in {stage}" if code is None else f"exit code {code} in {stage}"
    return f"{state}; the same command continues it" if code in CONTINUED else state


def _may_run(status: Mapping[str, Any]) -> bool:
    """Return False if the run has ended, or its process is gone; one of another machine cannot be looked up."""
    return status["exit_code"] is None and (_silence(status) > 0 or _is_alive(status["pid"], status["created"]))


def _silence(status: Mapping[str, Any]) -> float:
    """Return the seconds, at least one, since a run of another machine wrote its STATUS.json; 0 for one of this."""
    return 0.0 if status["host"] == socket.gethostname() else max(1.0, time.time() - status["updated"])


def _is_alive(pid: int, created: float) -> bool:
    """Return False if no process of this machine has this number, or it is another one, or one that was killed."""
    import psutil  # which --help does without

    try:
        process = psutil.Process(pid)
        # The clock may have been set since. A zombie has ended, and nobody has asked how.
        return abs(process.create_time() - created) < 5 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:  # a process of somebody else
        return True
    except (psutil.NoSuchProcess, ValueError):  # ValueError: a negative pid, of a damaged file
        return False


def _stage(run: Path, stage: str, status: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of _COLUMNS with values for a stage; {} if it has not begun."""
    steps, current = read_steps(run / stage), status.get("stage") == stage
    done = (run / stage / MANIFEST).exists()
    if not (steps or done or current):
        return {}
    running = current and _may_run(status)
    last, total = steps[-1] if steps else {}, status.get("total_steps") if current else None
    count = last.get("step")
    left = None
    if last and total and not done:
        count = f"{count}/{total} ({100 * last['step'] // total}%)"  # 40/100 (40%)
        now = [step["time"] for step in steps if step["time"] >= status.get("started", 0)]  # after any pause
        if running and len(now) > 1:
            each = (now[-1] - now[0]) / (len(now) - 1)
            # 2 s a step so far, and 60 to come: 0:02:00. After 20 of its steps a run on another machine may be dead.
            if _silence(status) < max(60, 20 * each):
                left = str(timedelta(seconds=round(each * (total - last["step"]))))
    mixup = last.get("mixup") if last.get("mixup_tokens") else None
    figures = [last.get("loss"), last.get("ntp"), mixup, last.get("learning_rate"), last.get("tokens_per_second")]
    state = "done" if done else "running" if running else "interrupted"
    return dict(zip(_COLUMNS, [stage, state, count, *figures, left], strict=True))


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value) if isinstance(value, float) else str(value)
