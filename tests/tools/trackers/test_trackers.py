"""Trackers against their real clients, without a network: what each has written is read back, and is metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from sftmix.common.errors import InUseError
from sftmix.testing import check_callback
from sftmix.tools.trackers import STAGES, TRACKERS, Tracker
from tests.tiny import in_this_process, metrics
from tests.tiny import sftmix as command

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # warnings of the clients


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "t")}.items():
        monkeypatch.setenv(name, value)


# ------------------------------------------------------------------------------------------ what clients wrote


@dataclass
class Written:
    """What one store of a client holds: (step, values) of its rows in their order, the configuration, the summary."""

    rows: list[tuple[int, dict[str, float]]]
    config: Any
    summary: dict[str, float]
    times: list[float] = field(default_factory=list)  # where the client takes one


def of_tensorboard(run: Path) -> Written:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    files = sorted((run / "trackers" / "tensorboard").glob("events*"))
    events = [event for file in files for event in LegacyEventFileLoader(str(file)).Load() if event.summary.value]
    (config,) = [event.summary.value[0] for event in events if event.summary.value[0].tag == "config/text_summary"]
    text = config.tensor.string_val[0].decode()
    found = Written([], yaml.safe_load(text.strip("`")), {})
    for event in events:
        values = {value.tag: value.simple_value for value in event.summary.value}
        if any(tag.startswith("summary/") for tag in values):
            found.summary |= {tag.removeprefix("summary/"): value for tag, value in values.items()}
        elif "config/text_summary" not in values:
            found.rows.append((event.step, values))
            found.times.append(event.wall_time)
    return found


def of_trackio(run: Path) -> Written:
    import os

    database = sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "sftmix.db")
    lines = [
        (step, json.loads(text)) for step, text in database.execute("select step, metrics from metrics order by id")
    ]
    ((config,),) = database.execute("select config from configs")
    config = {key: value for key, value in json.loads(config).items() if not key.startswith("_")}
    rows = [line for line in lines if not any(key.startswith("summary/") for key in line[1])]
    summaries = [values for _, values in lines if any(key.startswith("summary/") for key in values)]
    return Written(rows, config, {k.removeprefix("summary/"): v for s in summaries for k, v in s.items()})


READERS = {"tensorboard": of_tensorboard, "trackio": of_trackio}
"""Clients with one store, which is continued; the others begin a directory in each process, and it gets all rows."""


def expected(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The rows of metrics.jsonl: every number but step and time."""
    found = []
    for stage in (stage for stage in STAGES if (run / stage).exists()):
        for line in metrics(run, stage):
            kept = {k: v for k, v in line.items() if k not in ("step", "time", "rows") and v is not None}
            found.append((line["step"], {f"{stage}/{k}": v for k, v in kept.items()}))
    return found


def assert_same(
    client: str, found: list[tuple[int, dict[str, float]]], wanted: list[tuple[int, dict[str, float]]]
) -> None:
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [set(values) for _, values in found] == [set(values) for _, values in wanted]
    exact = np.float32 if client == "tensorboard" else np.float64  # which is what it keeps
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        assert {k: exact(v) for k, v in ours.items()} == {k: exact(v) for k, v in theirs.items()}


def needs(client: str) -> None:
    if importlib.util.find_spec(client) is None:
        pytest.skip(f"{client} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("client", TRACKERS)
def test_a_replay_sends_every_step_of_all_stages_once(client, finished, tmp_path):
    needs(client)
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    total, sent = len(expected(run)), []
    for _ in range(2):
        done = command("track", str(run), "--to", client)
        assert done.returncode == 0, done.stderr
        sent.append(done.stdout.partition(f"{run}: ")[2].partition(" steps")[0])
    assert sent == [f"{total} of {total}", f"{0 if client in READERS else total} of {total}"]
    if client not in READERS:
        return
    written, summary = READERS[client](run), json.loads((run / "summary.json").read_text())
    assert_same(client, written.rows, expected(run))
    assert written.times in ([], [line["time"] for stage in STAGES for line in metrics(run, stage)])
    assert written.config == yaml.safe_load((run / "config.yaml").read_text())
    assert written.summary["eval_nll_after"] == pytest.approx(summary["eval_nll_after"], rel=1e-7)
    assert written.summary["stages/train/steps"] == summary["stages"]["train"]["steps"]


DIES = """
import os, signal
from sftmix.components import Callback

class Dies(Callback):
    gives = frozenset()
    def on_step_end(self, state):
        if state.stage == "train" and state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("client", READERS)
def test_a_killed_and_resumed_run_has_every_step_once(client, tiny, tmp_path):
    """Killed at step 5, and continued from step 2: the client may have four steps of train by then, or fewer."""
    needs(client)
    (tmp_path / "parts.py").write_text(DIES)
    run, name = tmp_path / "run", TRACKERS[client].__name__
    words = ["run", *tiny.options, "--training.max_steps", "7", "--checkpoint.every", "2", "--out", str(run)]
    words += ["--callbacks+", f"sftmix.tools.trackers.{name}"]
    first = command(*words, "--callbacks+", "parts.Dies", cwd=tmp_path)
    assert first.returncode == -9, first.stderr
    before = metrics(run)
    assert len(before) == 4
    shutil.rmtree(run / "train" / "checkpoints" / "step-00000004")
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "failed" not in again.stderr
    assert "train: resuming after step 2 of 7" in again.stdout
    assert len(expected(run)) == 14
    done = command("track", str(run), "--to", client)
    assert f"{run}: 0 of 14 steps sent to {client}" in done.stdout, done.stderr
    written = READERS[client](run)
    assert_same(client, without_rates(written.rows), without_rates(expected(run)))
    assert written.summary["stages/train/steps"] == 7


def without_rates(rows: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """The rows without tokens/s: of a step that was made twice, the client may have that of the first time."""
    return [(step, {k: v for k, v in values.items() if "per_second" not in k}) for step, values in rows]


# ------------------------------------------------------------------------------------------------ without a client


class Memory(Tracker):
    """A client that keeps what it is sent, and has the first row already."""

    client = "memory"

    def open(self, run, config):
        self.sent = []
        return 1

    def write(self, row):
        self.sent.append((row.number, row.stage, row.step, row.time, dict(row.values)))

    def summarise(self, figures):
        pass

    def close(self):
        pass


def lay(run: Path, **stages: int) -> Path:
    """A run directory with metrics of so many steps."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("{}")
    for stage, steps in stages.items():
        (run / stage).mkdir()
        lines = [
            json.dumps({"step": k, "time": 9.0 + k, "loss": 1 / k, "grad_norm": None}) for k in range(1, steps + 1)
        ]
        (run / stage / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return run


def test_rows_come_in_the_order_of_the_stages_each_once(tmp_path):
    tracker = Memory()
    tracker.begin(lay(tmp_path, train=2, reference=1))
    assert tracker.send() == 2
    expected = [(1, "train", 1, 10.0, {"train/loss": 1.0}), (2, "train", 2, 11.0, {"train/loss": 0.5})]
    assert tracker.sent == expected  # null is no value
    with (tmp_path / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time": 12.0, "lo')
        file.flush()
        assert tracker.send() == 0
        file.write('ss": 0.25}\n')
    assert (tracker.send(), tracker.send(), tracker.rows) == (1, 0, 4)
    assert tracker.sent[2:] == [(3, "train", 3, 12.0, {"train/loss": 0.25})]
    tracker.end()


def test_what_cannot_be_tracked_is_told(tmp_path, sftmix, monkeypatch):
    (tmp_path / "empty").mkdir()
    done = sftmix("track", str(tmp_path / "empty"), "--to", "tensorboard")
    assert (done.code, "is not a run directory" in done.err) == (2, True)
    run = str(lay(tmp_path / "run", train=1))
    assert "invalid choice: 'mlflow'" in sftmix("track", run, "--to", "mlflow").err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package wandb: pip install wandb" in sftmix("track", run, "--to", "wandb").err


def test_one_process_and_one_rank_send_a_run(tmp_path):
    run, tracker = lay(tmp_path / "run", train=1), Memory()
    tracker.on_step_end(SimpleNamespace(is_main=False, directory=run / "train"))
    assert not (run / "trackers").exists()
    tracker.on_step_end(SimpleNamespace(is_main=True, directory=run / "train"))
    assert (tracker.sent, tracker.rows) == ([], 1)
    with pytest.raises(InUseError):
        Memory().begin(run)
    tracker.end()


@pytest.mark.parametrize("client", TRACKERS)
def test_a_tracker_is_a_callback_that_keeps_the_contract(client):
    check_callback(TRACKERS[client]())


BROKEN = """
from sftmix.tools.trackers import TensorBoard

class Broken(TensorBoard):
    def write(self, row):
        raise OSError("no route to host")
"""


def test_a_tracker_that_fails_ends_no_run(tiny, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    words = ["--objective", "NTP", "--training.max_steps", "2", "--callbacks+", "broken.Broken"]
    done = in_this_process("run", *tiny.options, *words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "no route to host" in line]
    assert told == [
        "note: Broken failed, and the run goes on without it: no route to host; `sftmix track run --to tensorboard` "
        "sends what is missing"
    ]
