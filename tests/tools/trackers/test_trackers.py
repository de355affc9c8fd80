"""Trackers against their real clients, without a network: what each has written is read back, and is metrics.jsonl."""

import json
import os
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from sftmix.pipeline.lock import Hold
from sftmix.pipeline.stages import TRAINED
from sftmix.testing import check_callback
from sftmix.tools.trackers import TRACKERS, Tracker
from sftmix.words.errors import InUseError
from tests.tiny import in_this_process, metrics
from tests.tiny import sftmix as command

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # warnings of the clients


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "t")}.items():
        monkeypatch.setenv(name, value)


# ------------------------------------------------------------------------------------------ what clients wrote


Rows = list[tuple[int, dict[str, float]]]
"""Step and values of each row."""


def of_tensorboard(run: Path) -> tuple[Rows, Any]:
    """All rows, that of the summary last, and the configuration."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (file,) = (run / "trackers" / "tensorboard").glob("events*")
    first, *events = [event for event in LegacyEventFileLoader(str(file)).Load() if event.summary.value]
    config = yaml.safe_load(first.summary.value[0].tensor.string_val[0].decode().strip("`"))
    times = [event.wall_time for event in events[:-1]]
    assert times == sorted(times)
    return [(event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in events], config


def of_trackio(run: Path) -> tuple[Rows, Any]:
    database = sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "sftmix.db")
    lines = database.execute("select step, metrics from metrics order by id")
    ((config,),) = database.execute("select config from configs")
    config = {key: value for key, value in json.loads(config).items() if not key.startswith("_")}
    return [(step, json.loads(text)) for step, text in lines], config


def of_mlflow(run: Path) -> tuple[Rows, Any]:
    """The rows by stage and step; a name has the history of a metric, and options are texts."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run / 'trackers' / 'mlflow' / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("sftmix").experiment_id])
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for name in found.data.metrics:
        stage = [*TRAINED, "summary"].index(name.partition("/")[0])
        for one in client.get_metric_history(found.info.run_id, name):
            assert rows.setdefault((stage, one.step), {}).setdefault(name, one.value) == one.value
    config = yaml.safe_load((run / "config.yaml").read_text())
    of_training = {name: f"{value}" for name, value in config["training"].items()}
    assert {name: found.data.params[f"training.{name}"] for name in of_training} == of_training
    assert found.data.params["objective.init_args.mu"] == "0.2"
    return [(step, rows[stage, step]) for stage, step in sorted(rows)], config


READERS = {"mlflow": of_mlflow, "tensorboard": of_tensorboard, "trackio": of_trackio}
"""Clients whose store is read back here."""
KEEP = ("mlflow", "trackio")
"""Clients that have one store; of the others every process begins one, and it gets all rows."""


def expected(run: Path) -> Rows:
    """The rows of metrics.jsonl: every number but step and time."""
    found = []
    for stage in (stage for stage in TRAINED if (run / stage).exists()):
        for line in metrics(run, stage):
            kept = {k: v for k, v in line.items() if k not in ("step", "time", "rows") and v is not None}
            found.append((line["step"], {f"{stage}/{k}": v for k, v in kept.items()}))
    return found


def rounded(rows: Rows) -> Rows:
    """The rows in the float32 of TensorBoard; without tokens/s, since a step may have been made twice."""
    return [(step, {k: float(np.float32(v)) for k, v in row.items() if "per_second" not in k}) for step, row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("client", TRACKERS)
def test_a_replay_sends_every_step_of_all_stages_once(client, finished, tmp_path):
    pytest.importorskip(client)
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    total, sent = len(expected(run)), []
    for _ in range(2):
        done = command("track", str(run), "--to", client)
        assert done.returncode == 0, done.stderr
        sent.append(done.stdout.partition(f"{run}: ")[2].partition(" steps")[0])
    assert sent == [f"{total} of {total}", f"{0 if client in KEEP else total} of {total}"]
    if client in READERS:
        rows, config = READERS[client](run)
        assert rounded([row for row in rows if "summary/eval_nll_after" not in row[1]]) == rounded(expected(run))
        last = rows[-1][1]
        assert config == yaml.safe_load((run / "config.yaml").read_text())
        summary = json.loads((run / "summary.json").read_text())
        assert last["summary/eval_nll_after"] == pytest.approx(summary["eval_nll_after"], rel=1e-7)
        assert last["summary/stages/train/steps"] == summary["stages"]["train"]["steps"]


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
@pytest.mark.parametrize("client", TRACKERS)
def test_a_killed_and_resumed_run_has_every_step_once(client, tiny, tmp_path):
    """Killed at step 5, and continued from step 2: the client may have four steps of train by then, or fewer.

    What a client leaves in the run directory, as W&B's links, keeps no command from the run.
    """
    pytest.importorskip(client)
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
    done = command("track", str(run), "--to", client)
    sent = f"{run}: {0 if client in KEEP else 14} of 14 steps sent to {client}"
    assert sent in done.stdout, done.stderr
    assert ("which had the others" in done.stdout) == (client in KEEP)
    if client in READERS:
        (*rows, _), _ = READERS[client](run)
        assert rounded(rows) == rounded(expected(run))
    for more in (["report", str(run), "--map", "0"], ["export", str(run), "--to", str(tmp_path / "to")], words):
        ended = command(*more, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr


def test_a_role_has_a_name_that_mlflow_takes(tmp_path):
    """MLflow refuses all options, and so the run, for one name."""
    mlflow = pytest.importorskip("mlflow")
    run = lay(tmp_path / "run", train=1)
    (run / "config.yaml").write_text("data: {roles: {C++: user}}")
    tracker = TRACKERS["mlflow"]()
    tracker.begin(run)
    assert tracker.send() == 1
    tracker.end()
    client = mlflow.MlflowClient(f"sqlite:///{run / 'trackers' / 'mlflow' / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("sftmix").experiment_id])
    assert found.data.params == {"data.roles.C__": "user"}


# ------------------------------------------------------------------------------------------------ without a client


class Memory(Tracker):
    """A client that keeps what it is sent, and has the first row already."""

    client = "memory"

    def open(self):
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
        lines = [{"step": k, "time": 9.0 + k, "loss": 1 / k, "grad_norm": None} for k in range(1, steps + 1)]
        (run / stage / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
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


def test_a_missing_package_is_told(tmp_path, sftmix, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = sftmix("track", str(lay(tmp_path / "run", train=1)), "--to", "wandb")
    assert (done.code, "needs the package wandb: pip install wandb" in done.err) == (2, True)


def test_one_process_and_one_rank_send_a_run(tmp_path):
    run, tracker = lay(tmp_path / "run", train=1), Memory()
    tracker.on_step_end(SimpleNamespace(is_main=False, directory=run / "train"))
    assert not (run / "trackers").exists()
    tracker.on_step_end(SimpleNamespace(is_main=True, directory=run / "train"))
    assert (tracker.sent, tracker.rows) == ([], 1)
    tracker.end()
    with Hold(run / "trackers" / "memory"), pytest.raises(InUseError, match="wait for it, or use another directory"):
        tracker.begin(run)


def test_a_run_that_cannot_be_written_is_not_tracked(tmp_path, sftmix):
    """The message names no option that the command lacks."""
    run = lay(tmp_path / "run", train=1)
    (run / "trackers").write_text("in the way")
    done = sftmix("track", str(run), "--to", "tensorboard")
    assert (done.code, f"error: {run / 'trackers' / 'tensorboard'} cannot be written: " in done.err) == (2, True)
    assert "out" not in done.err.partition("cannot be written")[2]


def test_a_tracker_is_a_callback_that_keeps_the_contract():
    check_callback(Memory())


NOTED = """
from sftmix.tools.trackers import TensorBoard

class Noted(TensorBoard):
    def open(self):
        print(f"NOTED {self.run.parent.name} opened")
        return super().open()
    def close(self):
        print("NOTED closed")
        super().close()
"""


@pytest.mark.slow
def test_each_run_of_a_table_has_a_client_of_its_own(tiny, tmp_path):
    """A library such as wandb has one run a process, and each cell a tracker, as the callback of its configuration."""
    (tmp_path / "noted.py").write_text(NOTED)
    words = ["--objective", "NTP", "--training.max_steps", "2", "--callbacks+", "noted.Noted"]
    (tmp_path / "table.yaml").write_text("variants: {one: {}, two: {training.learning_rate: 0.02}}")
    words += ["--config", "table.yaml", "--seeds", "[1]", "--out", "table"]
    done = in_this_process("compare", *tiny.options, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("NOTED ") for line in done.stdout.splitlines() if line.startswith("NOTED")]
    assert told == ["one opened", "closed", "two opened"]
    (first,) = (tmp_path / "table").glob("one/*/trackers/tensorboard")
    with Hold(first):  # nothing of this process has it
        pass


def test_the_newest_of_two_trackers_for_one_run_sends_it(tmp_path):
    """As in a notebook that runs a cell again after an error, or for a callback that is named twice."""
    run, trackers = lay(tmp_path / "run", train=2), [Memory(), Memory()]
    state = SimpleNamespace(is_main=True, directory=run / "train")
    for tracker in trackers * 2:
        tracker.on_step_end(state)
    assert [tracker.run for tracker in trackers] == [None, run]
    trackers[1].end()


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
