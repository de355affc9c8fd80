"""Trackers, which show the metrics of runs: as callbacks (`--callbacks+ sftmix.tools.trackers.WandB`), or by `track`.

What is sent is metrics.jsonl, line by line, so that both ways give the same. Nothing else of this package imports the
room, and each client is imported when it is used.
"""

import atexit
import contextlib
import os
import re
import sys
import time
import uuid
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sftmix.cli.say import as_word
from sftmix.components.base import Callback, StageState
from sftmix.config.read import read_yaml
from sftmix.disk.files import read_object, write_text
from sftmix.disk.regular import regular
from sftmix.disk.texts import read_text
from sftmix.pipeline.lock import Hold
from sftmix.pipeline.stages import TRAINED

_NOT_PLOTTED = ("step", "time", "rows")
"""Keys of metrics.jsonl: rows is a hash."""


class Row(NamedTuple):
    """One optimizer step of a stage: a line of its metrics.jsonl.

    number  place among all rows of the run, from 0
    step    of the stage, from 1
    time    seconds since the epoch when the step ended
    values  STAGE/metric -> finite number
    """

    number: int
    stage: str
    step: int
    time: float
    values: Mapping[str, float]


class Tracker(Callback):
    """A callback that sends the rows of a run to a client: those that it lacks, each once, in their order.

    `open` says how many rows the client has. A resumed run, or `sftmix track` after it, therefore goes on where the
    client is, whatever became of the process before. Steps that a resumed run makes again keep their numbers. A row
    is sent when the next step ends, the last one of a stage at its end. An error of a client ends no training: it is
    reported once, and the rest is left to `sftmix track`.
    """

    gives = frozenset()
    client: str
    """The name of the client, for `sftmix track --to` and for its folder."""
    run: Any = None
    """The run directory that it sends, and the plain form of its configuration."""
    config: dict[str, Any]
    folder: Path
    """RUN/trackers/CLIENT, with the id of the client's run and what the client keeps on disk."""

    _client: Any
    _left: Path | None = None
    """A run of which it sends no more: its client failed, or another tracker has taken it over."""

    def __init__(self, *, project: str = "sftmix"):
        """project: where the run is shown; tensorboard has none."""
        self.project = project
        self.rows = 0
        """Rows of the run that were read so far, those that the client had before included."""
        self._closing = contextlib.ExitStack()

    @abstractmethod
    def open(self) -> int:
        """Begin or continue the client's run; return the number of rows that it has."""

    def write(self, row: Row) -> None:
        """Send a row."""
        self._client.log(dict(row.values), step=row.step)

    def summarise(self, figures: Mapping[str, float]) -> None:
        """Send the numbers of summary.json, as summary/NAME."""
        self.write(Row(-1, "summary", 0, time.time(), figures))

    def close(self) -> None:
        """Send what is still on its way, and end."""
        self._client.finish()

    def identity(self) -> str:
        """Return the id of the client's run; it is made once and kept in the folder."""
        file = self.folder / "id"
        if not file.exists():
            write_text(file, uuid.uuid4().hex[:21])  # SwanLab took exactly 21 characters, now up to 64
        return read_text(file)

    def begin(self, run: Path) -> None:
        """Open the client for a run directory, unless it is open; the tracker that has it open is ended first.

        Raises InUseError if another process sends the rows of this run to the same client.
        """
        if self.run == run:
            return
        self.end()
        if former := _OPEN.get(self.client):
            former._left = former.run  # it sends no more of this run
            former.end()
        self.run, self.config, self.folder = run, read_yaml(run / "config.yaml"), run / "trackers" / self.client
        self._closing.enter_context(Hold(self.folder))  # closed in the opposite order: client, _OPEN, lock
        _OPEN[self.client] = self
        self._closing.callback(_OPEN.pop, self.client)
        self._known = self.open()
        self._closing.callback(self.close)
        self._read = dict.fromkeys(TRAINED, 0)
        self.rows = 0
        atexit.register(self.end)  # no hook says that a run is over

    def send(self) -> int:
        """Send the rows that the client lacks; return how many these were."""
        sent = 0
        for stage in TRAINED:
            path = self.run / stage / "metrics.jsonl"
            if not path.exists():
                continue
            with regular(path).open("rb") as file:
                file.seek(self._read[stage])  # a run that grows is read on from there
                lines = file.readlines()
            for text in lines:
                if not text.endswith(b"\n"):  # it is still being written
                    break
                self._read[stage] += len(text)
                if self.rows >= self._known:  # the client has those before
                    line = read_object(text, path, step=int, time=float)
                    values = {f"{stage}/{k}": v for k, v in line.items() if k not in _NOT_PLOTTED and v is not None}
                    self.write(Row(self.rows, stage, line["step"], line["time"], values))
                    sent += 1
                self.rows += 1
        return sent

    def end(self) -> None:
        """Close the client, if it is open."""
        self.run = None
        self._closing.close()

    def on_step_end(self, state: StageState) -> None:
        """Send what metrics.jsonl has; the line of this step is written after the callbacks."""
        # runs/first/train is a stage of runs/first.
        if not state.is_main or state.directory is None or (run := state.directory.parent) == self._left:
            return
        try:
            self.begin(run)
            self.send()
        except Exception as error:  # of libraries and networks: no reason to end a training
            self._left = run
            with contextlib.suppress(Exception):
                self.end()  # gives the lock back, for `sftmix track`
            print(
                f"note: {type(self).__name__} failed, and the run goes on without it: {error}; `sftmix track "
                f"{as_word(run)} --to {self.client}` sends what is missing",
                file=sys.stderr,
            )

    on_stage_start = on_stage_end = on_step_end


_OPEN: dict[str, Tracker] = {}
"""Client -> the tracker of this process that has it open: a library such as wandb has one run a process, and a table of
runs makes a tracker for each."""


class TensorBoard(Tracker):
    """Event files in RUN/trackers/tensorboard, for `tensorboard --logdir RUN`."""

    package = client = "tensorboard"

    def open(self) -> int:
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import text

        for old in self.folder.glob("events.out.tfevents.*"):  # every process writes all rows anew
            old.unlink()
        self._client = FileWriter(str(self.folder))
        self._client.add_summary(text("config", f"```\n{read_text(self.run / 'config.yaml')}```"), 0)
        return 0

    def write(self, row: Row) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for the whole row: it is in the file or not, and all rows of a run are written in no time.
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.values.items()]
        self._client.add_summary(Summary(value=scalars), row.step, row.time)

    def close(self) -> None:
        self._client.close()


class WandB(Tracker):
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/trackers/wandb, for `wandb sync`."""

    package = client = "wandb"

    def open(self) -> int:
        import wandb

        self._client = wandb.init(
            project=self.project,
            id=self.identity(),
            name=self.run.name,
            resume="allow",
            dir=str(self.folder.parent),  # in which wandb makes its folder, which has the name of ours
            config=self.config,
            settings=wandb.Settings(console="off"),  # it would wrap stderr, and with it the live line
        )
        for stage in TRAINED:  # a step of W&B is a row; charts go by the step of the stage
            self._client.define_metric(f"{stage}/step", hidden=True)
            self._client.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        # Online this is what the server has. Offline it is 0: every process begins a new directory, which gets all
        # rows, so that the newest one is the whole run.
        return int(self._client.step)

    def write(self, row: Row) -> None:
        more = {f"{row.stage}/step": row.step, "_timestamp": row.time}
        self._client.log({**row.values, **more}, step=row.number)

    def summarise(self, figures: Mapping[str, float]) -> None:
        self._client.summary.update(figures)


class Trackio(Tracker):
    """A run of trackio, on this machine, for `trackio show`; `trackio sync` sends it to a Space."""

    package = client = "trackio"

    def open(self) -> int:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{self.run.name}-{self.identity()[:8]}"  # a run is resumed by its name
        self._client = trackio.init(project=self.project, name=name, resume="allow", config=self.config, embed=False)
        logs = SQLiteStorage.get_logs(self.project, name)
        # Its log also has the row summary/..., which is none of metrics.jsonl.
        return sum(any(key.partition("/")[0] in TRAINED for key in log) for log in logs)


class SwanLab(Tracker):
    """An experiment of SwanLab; SWANLAB_MODE=offline keeps it in RUN/trackers/swanlab, for `swanlab sync`."""

    package = client = "swanlab"

    def open(self) -> int:
        import swanlab

        self._client = swanlab.init(
            project=self.project,
            id=self.identity(),
            name=self.run.name,
            resume="allow",
            log_dir=str(self.folder),
            config=self.config,
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),  # else stderr is wrapped, with the live line
        )
        # Offline every process begins a new directory, which gets all rows. Online the client knows the last step that
        # the server has of each metric, and leaves out what comes before.
        return 0

    def summarise(self, figures: Mapping[str, float]) -> None:
        self._client.config.update(figures)


class MLflow(Tracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI or in RUN/trackers/mlflow/mlflow.db; an experiment is a project."""

    package = client = "mlflow"

    def open(self) -> int:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from pandas import json_normalize

        # No global state of mlflow is used, in which a run of somebody else may be active.
        own, file = regular(self.folder / "mlflow.db"), self.folder / "id"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own}")
        if not file.exists():
            experiment = self._client.get_experiment_by_name(self.project)
            place = experiment.experiment_id if experiment else self._client.create_experiment(self.project)
            new = self._client.create_run(place, run_name=self.run.name).info.run_id
            # {training: {epochs: 3}} -> training.epochs; MLflow cuts a value behind 6,000 characters.
            (options,) = json_normalize([self.config]).to_dict("records")
            self._client.log_batch(new, params=[Param(_allowed(key), str(value)) for key, value in options.items()])
            write_text(file, new)
        self._id = read_text(file)
        self._client.update_run(self._id, status="RUNNING")
        # Every row counts its tokens.
        return sum(len(self._client.get_metric_history(self._id, f"{stage}/tokens")) for stage in TRAINED)

    def write(self, row: Row) -> None:
        from mlflow.entities import Metric

        # One request for the whole row.
        metrics = [Metric(_allowed(name), value, int(1000 * row.time), row.step) for name, value in row.values.items()]
        self._client.log_batch(self._id, metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _allowed(name: str) -> str:
    """Return a name as MLflow takes it: in a label C++, or a role of a row, it takes no other characters."""
    return re.sub(r"[^\w/. :-]", "_", name)


TRACKERS = {kind.client: kind for kind in (MLflow, SwanLab, TensorBoard, Trackio, WandB)}
"""The name that `sftmix track --to` takes -> the class."""
