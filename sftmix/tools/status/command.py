"""`status`: the progress of a run or a table, from its files alone; it may be on another machine, or finished."""

import json
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sftmix.cli.say import say
from sftmix.config.read import TABLE, read_yaml
from sftmix.disk.files import MANIFEST, naming_damage, read_steps
from sftmix.disk.places import is_there
from sftmix.tools.runs.read import read_json_if_there, stages_in
from sftmix.tools.runs.results import at, held_out
from sftmix.tools.runs.shown import markdown_table
from sftmix.words.errors import INTERRUPTED, ConfigError, NoSpaceError, SFTMixError, Stopped
from sftmix.words.shown import counted

ABOUT = """Show how far runs are: stages, steps, last loss, time left, and whether the process is alive.
It reads files only, so it works while a run goes on and after it has ended.

  sftmix status runs/first
  sftmix status runs/first runs/second --json"""

CONTINUED = (None, INTERRUPTED, Stopped.exit_code, NoSpaceError.exit_code)
"""Exit codes after which the same command continues the run; a killed process has null."""

_COLUMNS = ["stage", "state", "steps", "loss", "NTP", "Mixup", "lr", "tokens/s", "left"]
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
            found.append(state_of(Path(run)))
            if not args.json:
                say(shown(found[-1]) + "\n", sys.stdout)
        except SFTMixError as error:
            problems.append(error)
    if args.json:
        say(json.dumps(found, indent=1), sys.stdout)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def state_of(run: Path) -> dict[str, Any]:
    """Return the state of a run directory, or of a table with its runs, also those that are only planned.

    run        the directory, as it was given
    state      finished, running, died, failed or not started
    stage, exit_code, message, doing, pid, host  of STATUS.json; null or "" if it does not say
    continues  whether the same command continues it
    stages     of a run: a mapping for each stage that has begun
    runs       of a table: the states of its runs, each with `variant`, `seed` and `value`, the table's `metric`
    summary    of a run: its summary.json, or {}

    Raises ConfigError if it is neither, DifferenceError if its files are not as a run writes them.
    """
    with naming_damage(f"a file of {run}"):
        if is_there(run / TABLE):
            plan = read_yaml(run / TABLE)
            cells = [(str(variant), seed) for seed in plan["seeds"] for variant in plan["variants"]]  # 0.4 is a number
            runs = []
            for variant, seed in cells:
                cell = _run_state(run / variant / f"seed-{seed}")
                value = at(cell.pop("summary"), plan["metric"])
                runs.append({"variant": variant, "seed": seed, "value": value, **cell})
            return {**_state(run, read_json_if_there(run / "STATUS.json")), "metric": plan["metric"], "runs": runs}
        state = _run_state(run)
        if state["state"] == "not started" and not is_there(run / "config.yaml"):
            raise ConfigError(f"{run} is not a run directory: it has neither STATUS.json nor config.yaml")
        return state


def shown(state: Mapping[str, Any]) -> str:
    """Return what `state_of` returned as text: one line, a table, and how far the whole is."""
    if "runs" in state:
        rows = [["variant", "seed", "state", "steps", state["metric"]]]
        for run in state["runs"]:
            at_work = [_steps(stage) for stage in run["stages"] if stage["stage"] == run["stage"]]
            value = _number(run["value"])
            rows.append([run["variant"], str(run["seed"]), _words(run), *(at_work or [""]), value])
        finished = sum(run["state"] == "finished" for run in state["runs"])
        notes = [f"{finished} of {counted(len(state['runs']), 'run')} finished"]
    else:
        rows = [_COLUMNS, *map(_cells, state["stages"])]
        notes = held_out(state["summary"])
    why = _SAID.sub("", state["message"])
    return "\n".join([f"{state['run']}: {_words(state)}{why and ': '}{why}", markdown_table(rows), *notes])


def _run_state(run: Path) -> dict[str, Any]:
    status = read_json_if_there(run / "STATUS.json")
    stages = [stage for name in stages_in(run) if (stage := _stage(run, name, status))]
    return {**_state(run, status), "stages": stages, "summary": read_json_if_there(run / "summary.json")}


def _state(run: Path, status: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run ended, or which process it is, and whether the same command continues it."""
    code = status["exit_code"] if status else None
    alive = bool(status) and _may_run(status)
    words = "running" if alive else "finished" if code == 0 else "failed" if code else "died"
    return {
        "run": str(run),
        "state": words if status else "not started",
        "exit_code": code,
        "continues": bool(status) and not alive and code in CONTINUED,
        **{name: status.get(name) for name in ("stage", "pid", "host")},
        **{name: status.get(name) or "" for name in ("doing", "message")},
    }


def _words(state: Mapping[str, Any]) -> str:
    """Return a state as people read it: "exit code 143 in train; the same command continues it"."""
    if state["state"] in ("finished", "not started"):
        return str(state["state"])
    if state["state"] == "running":
        doing = f" ({state['doing']})" if state["doing"] else ""
        return f"running {state['stage']}{doing}, pid {state['pid']} on {state['host']}"
    end = "died" if state["state"] == "died" else f"exit code {state['exit_code']}"
    return f"{end} in {state['stage']}" + "; the same command continues it" * state["continues"]


def _may_run(status: Mapping[str, Any]) -> bool:
    """Return False if the run has ended, or its process is gone; one of another machine cannot be looked up."""
    return status["exit_code"] is None and (
        status["host"] != socket.gethostname() or _is_alive(status["pid"], status["created"])
    )


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
    """Return how far a stage is, with the figures of its last step; {} if it has not begun."""
    steps, current = read_steps(run / stage), status.get("stage") == stage
    done = (run / stage / MANIFEST).exists()
    if not (steps or done or current):
        return {}
    running = current and _may_run(status)
    last, total = steps[-1] if steps else {}, status.get("total_steps") if current else None
    left = None
    if running and total:
        now = [step["time"] for step in steps if step["time"] >= status.get("started", 0)]  # after any pause
        if len(now) > 1:
            # 2 s a step so far, and 60 to come: 120.
            left = (now[-1] - now[0]) / (len(now) - 1) * (total - last["step"])
    figures = ("step", "loss", "ntp", "mixup", "mixup_tokens", "learning_rate", "tokens_per_second")
    return {
        "stage": stage,
        "state": "done" if done else "running" if running else "interrupted",
        "total_steps": total,
        **{name: last.get(name) for name in figures},
        "seconds_left": left,
    }


def _cells(stage: Mapping[str, Any]) -> list[str]:
    """Return the cells of _COLUMNS for a stage."""
    left = stage["seconds_left"]
    return [
        stage["stage"],
        stage["state"],
        _steps(stage),
        _number(stage["loss"]),
        _number(stage["ntp"]),
        _number(stage["mixup"]) if stage["mixup_tokens"] else "",
        _number(stage["learning_rate"], "{:.2e}"),
        _number(stage["tokens_per_second"], "{:,.0f}"),
        "" if left is None else str(timedelta(seconds=round(left))),  # 0:02:00
    ]


def _steps(stage: Mapping[str, Any]) -> str:
    """Return the steps of a stage: 50, and while it is not done 40/100 (40%)."""
    step, total = stage["step"], stage["total_steps"]
    if step is None:
        return ""
    return str(step) if stage["state"] == "done" or not total else f"{step}/{total} ({100 * step // total}%)"


def _number(value: Any, form: str = "{:.4f}") -> str:
    return form.format(value) if isinstance(value, int | float) else ""
