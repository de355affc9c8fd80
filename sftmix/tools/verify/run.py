"""Stages of a run, made again by the recipe's own functions in a copy of its directory, and compared with it."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from sftmix.common.checkpoints import BEST, CHECKPOINTS, step_path
from sftmix.common.errors import ConfigError
from sftmix.common.files import MANIFEST, read_json, sha256_file, verify_directory
from sftmix.common.tables import read_dynamics, read_table, write_table
from sftmix.common.world import World, start_world
from sftmix.components.base import Callback, CallbackResult, Need, StageState
from sftmix.components.callbacks import Evaluate
from sftmix.components.mixing import MeasureMixing
from sftmix.config import RunConfig
from sftmix.config.read import read_config
from sftmix.pipeline.context import Made, RunContext, Stage
from sftmix.pipeline.directory import RunDirectory, differences
from sftmix.pipeline.identity import ALL, STAGE_INPUTS, Known, stages_entered
from sftmix.pipeline.recipe import confidence_stage, split_stage, write_summary
from sftmix.pipeline.reference import reference_stage
from sftmix.pipeline.rows import RunRows, read_rows, selected_ids
from sftmix.pipeline.target import arm_stage
from sftmix.tools.verify.findings import (
    OF_CONFIDENCE,
    Certificate,
    Finding,
    compare,
    compare_logs,
    rounded,
    tensors_in,
)
from sftmix.tools.verify.window import Window, logged_steps
from sftmix.training.checkpoint import full_weights
from sftmix.training.log import StopAtOnce
from sftmix.training.loop import Stage as TrainingStage
from sftmix.training.loop import StageResult, TrainingLoop
from sftmix.training.machine import machine_of, machines_between, same_bits

T = TypeVar("T")
HEAVY = (CHECKPOINTS, BEST, "model")
"""Folders of a finished stage that no later stage reads."""
OBSERVED = (Evaluate, MeasureMixing)
"""Callbacks that only watch and whose figures are compared. Others that only watch, as trackers, are left out: they
would tell the world of the steps a second time."""
NOT_MEASURED = ("made_by", "calibration_seconds", "scoring_seconds")
"""Figures of a stage that do not follow from its weights."""


def verify(window: Window) -> Certificate:
    """Make the window again and compare what it gives with what the run wrote; notes and progress go to stderr.

    Where files or inputs differ nothing is made again, and the certificate says so. Started by torchrun, every rank
    calls it and returns the same. Raises ConfigError where this machine cannot compute as the run did, and the errors
    of files and rows that cannot be read.
    """
    config = replace(read_config(window.run / "config.yaml"), with_baseline=window.stage == "baseline")
    with start_world(config.training.timeout) as world, contextlib.redirect_stdout(sys.stderr):
        if world.size > world.local_size:
            raise ConfigError(
                f"verify has {world.size} ranks on several nodes, which share no temporary directory; start it on one "
                f"node with torchrun --nproc_per_node {world.size}, or with fewer ranks"
            )
        window = world.share(window)  # a run that goes on may have saved since the other ranks looked
        findings = world.share(world.on_main(lambda: check_files(window)))
        with _copy_of(window, world) as place, RunDirectory(place, world) as directory, StopAtOnce() as stop:
            config = replace(config, out=str(place))
            config, rows = read_rows(config, world, run=window.run, progress=world.is_main)
            stages = world.share(_stages_up_to(window, config))
            known = Known(config, world, rows, window.run)
            findings += check_inputs(window, known, stages)
            if any(finding.same is False for finding in findings):
                findings.append(Finding("losses", None, "what the replay would read differs already"))
                return Certificate(window, findings)
            replay = Replay(window, config, world, directory, stop, rows)
            findings += world.share(replay.findings(stages))
            return Certificate(window, findings, replay.recorded, replay.machine)


# ------------------------------------------------------------------------------- what the replay would read


def check_files(window: Window) -> list[Finding]:
    """Compare every output of the finished stages, and every checkpoint of the window's stage, with its hash."""
    findings, outputs = [], 0
    for manifest in (window.run / stage / MANIFEST for stage in ALL if (window.run / stage / MANIFEST).exists()):
        for name, expected in read_json(manifest, files=dict)["files"].items():
            file, outputs = manifest.parent / name, outputs + 1
            digest = sha256_file(file) if file.is_file() else "no file"
            if digest != expected:
                findings.append(Finding("files", False, str(file.resolve()), False, expected, digest))
    problems = ((step, verify_directory(window.checkpoint(step))) for step in window.kept)
    findings += [
        Finding("files", False, f"checkpoint {step}: {problem}", False) for step, problem in problems if problem
    ]
    told = f"{outputs} outputs of finished stages and {len(window.kept)} checkpoints of {window.stage}, by their hashes"
    findings = findings or [Finding("files", True, told)]
    if not window.place.is_dir():
        findings.append(Finding("files", None, f"checkpoints: {window.place}, where the stage was made, is gone"))
    return findings


def check_inputs(window: Window, known: Known, stages: Sequence[str]) -> list[Finding]:
    """Compare what these stages recorded when they began with what configuration, rows and models are now."""
    findings = []
    for stage in stages:
        recorded = read_json(window.run / stage / "inputs.json")
        now = STAGE_INPUTS[stage](known)
        for line in differences(recorded, now):
            if known.config.training.precision == "auto" and "precision: " in line:
                raise ConfigError(
                    f"training.precision auto is another one here than where {stage} was made ({line}), so numbers "
                    "cannot be compared; verify it on a device of the same kind"
                )
            findings.append(Finding("inputs", False, f"{stage}: {line}", False))
    return findings or [Finding("inputs", True, f"options, seed, rows and model as {', '.join(stages)} recorded")]


def _stages_up_to(window: Window, config: RunConfig) -> list[str]:
    """List the stages that the window's stage is made from, in order, and itself."""
    entered = {*stages_entered(config, "train"), window.stage}
    upto = ALL[: ALL.index(window.stage) + 1]
    return [stage for stage in upto if stage in entered and (window.run / stage / "inputs.json").exists()]


# --------------------------------------------------------------------------- a copy of the run directory


@contextlib.contextmanager
def _copy_of(window: Window, world: World) -> Iterator[Path]:
    """Yield a directory of links to the files that the stages read, without what came after the window's start.

    Links of single files, in directories of their own, so that a file made here never replaces one of the run. All
    ranks of this machine share it; it is removed at the end.
    """
    place = Path(world.share(world.on_main(lambda: tempfile.mkdtemp(prefix="sftmix-verify-"))))
    try:
        world.on_main(lambda: _lay_out(window, place))
        yield place
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(place, ignore_errors=True)


def _lay_out(window: Window, place: Path) -> None:
    for stage in ALL:
        source = window.run / stage
        files = [file for file in source.rglob("*") if file.is_file()] if stage != window.stage else []
        for file in files:
            if file.relative_to(source).parts[0] not in HEAVY:
                _link(file, place / stage / file.relative_to(source))
    own, made = place / window.stage, window.place / "inputs.json"
    # The checkpoints hold the hash of the inputs as they were where the stage was made.
    _link(made if made.exists() else window.run / window.stage / "inputs.json", own / "inputs.json")
    if window.start:
        _link(window.file("metrics.jsonl"), own / "metrics.jsonl")  # the loop writes it anew up to the checkpoint
        _link(window.checkpoint(window.start), step_path(own / CHECKPOINTS, window.start))
    for file in window.file("online").glob("epoch-*.parquet"):  # the replay replaces those that it makes
        _link(file, own / "online" / file.name)
    for file in window.file("scores").glob("step-*.parquet"):
        if not window.start < int(file.stem.removeprefix("step-")) <= window.end:
            _link(file, own / "scores" / file.name)


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(file.absolute())


# ------------------------------------------------------------------------------------------- the replay


class StopAfter(Callback):
    """The end of a replay."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        return CallbackResult(stop=True) if state.step >= self._step else None


class Replay(RunContext):
    """A run of which some stages are made again, and of one of them only the steps of a window.

    recorded  the machines that made the steps in the run; machine: the one of the replay
    """

    def __init__(
        self,
        window: Window,
        config: RunConfig,
        world: World,
        directory: RunDirectory,
        stop: StopAtOnce,
        rows: RunRows,
    ) -> None:
        super().__init__(config, world, directory, stop, rows)
        self.window, self.place = window, directory.path
        self.recorded = world.share(world.on_main(lambda: _recorded(window)))
        self.machine: Mapping[str, Any] = {}
        self.exact = False
        self.weights, self.expected = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        """The weights after the window, and those of the run's checkpoint at its end, on rank 0."""

    def findings(self, stages: Sequence[str]) -> list[Finding]:
        """Make the stages again, each from the files of the run, and compare; the findings count on rank 0."""
        findings: list[Finding] = []
        rows = self.rows
        scores, split = rows.table(), None
        if "selection" in stages:
            name = "selection/selected.parquet"
            self.world.on_main(lambda: write_table(self.place / name, selected_ids(self.config, rows.whole)))
            findings += self._table(name)
        if "confidence" in stages:
            dynamics = None
            if "reference" in stages:
                dynamics = read_dynamics(self.place / "confidence" / "dynamics.parquet").of(rows.data.train.ids)
            scores = self._again(confidence_stage(self, dynamics), findings)
        if "split" in stages:
            split = self._again(split_stage(self, scores), findings)
        name, threads = self.window.stage, torch.get_num_threads()
        stage: Stage[Any] = reference_stage(self) if name == "reference" else arm_stage(self, name, scores, split)
        try:  # sums of another number of parts are rounded differently
            torch.set_num_threads(int(self.recorded[0]["threads"]) if self.recorded else threads)
            made = stage.make()
        finally:
            torch.set_num_threads(threads)
        if self._has_summary:
            write_summary(self, root=self.window.run)
        return findings + (self.world.on_main(lambda: [*self._steps_and_weights(), *self._figures(made)]) or [])

    @property
    def _has_summary(self) -> bool:
        """True after the last stage, so that the summary tells of all."""
        return self.window.finished and (self.window.run / "base" / "figures.json").exists()

    def _again(self, stage: Stage[T], findings: list[Finding]) -> T:
        """Make a stage again and compare its table; later stages read that of the run, so that each differs alone."""
        made = stage.make()
        findings += self.world.on_main(lambda: self._table(f"{stage.name}/{made.files[0]}")) or []
        self.world.barrier()
        return stage.read()

    def _table(self, name: str) -> list[Finding]:
        tables = [read_table(root / name, ["id"]) for root in (self.window.run, self.place)]
        expected, found = ({column: table[column].to_pylist() for column in table.column_names} for table in tables)
        _link(self.window.run / name, self.place / name)
        return compare("split", name, expected, found, relative=OF_CONFIDENCE, labels=expected["id"])

    def train(self, stage: TrainingStage) -> StageResult:
        """Train the steps of the window; then load the run's last weights, if it kept them, to be measured."""
        window, world = self.window, self.world
        watching = [one for one in stage.callbacks if isinstance(one, OBSERVED) or Need.STOP in one.gives]
        unsaved = replace(stage.checkpoint, every=0, keep_best=False, keep=2)  # 2: the link is never pruned
        self.stage = replace(stage, callbacks=[*watching, StopAfter(window.end)], checkpoint=unsaved)
        self.machine = machine_of(world, stage.options)
        self.exact = same_bits(self.recorded, self.machine)
        loop = TrainingLoop(self.stage, world)
        result = loop.run()
        self.weights, self.trained = _weights(loop.module), result.figures
        self.logged = logged_steps(stage.directory)
        world.barrier()
        world.on_main(lambda: _link(window.file("metrics.jsonl"), stage.directory / "metrics.jsonl"))
        loop.store.directory = window.place / CHECKPOINTS
        for step in sorted({window.end, window.last} & {*window.kept}):
            loop.store.load(step, loop.module, None)
            self.expected = _weights(loop.module) if step == window.end else self.expected
        return replace(result, figures={**result.figures, "steps": window.last})

    def _steps_and_weights(self) -> list[Finding]:
        window, model = self.window, f"{self.window.stage}/model"
        inputs = read_json(window.run / window.stage / "inputs.json", training=dict)
        relative = None if self.exact else rounded(inputs["training"]["precision"])
        findings = compare_logs(window.logged, self.logged, range(window.start + 1, window.end + 1), relative=relative)
        stored, made = tensors_in(window.run / model), tensors_in(self.place / model)
        if not self.exact:
            findings.append(Finding("weights", None, "another machine rounds them in another way"))
        elif window.end in window.kept:
            name = f"{CHECKPOINTS}/{window.checkpoint(window.end).name}"
            findings += compare("weights", name, self.expected, self.weights)
        elif stored and window.end == window.last:
            return findings + compare("weights", model, stored, made)
        else:
            findings.append(Finding("weights", None, f"the run kept none of step {window.end} as they were trained"))
        if stored and window.last in window.kept:
            findings += compare("model", model, stored, made)
        elif stored:
            told = f"{model}: step {window.last} has no checkpoint; a window up to this step compares it"
            findings.append(Finding("model", None, told))
        return findings

    def _figures(self, made: Made) -> list[Finding]:
        """Compare what the stage measured of the last weights, and the summary, gathered again."""
        window, own = self.window, self.window.run / self.window.stage
        whole = window.stage == "reference" or window.last in (window.end, *window.kept)
        if not (window.finished and whole):
            return []
        recorded = read_json(own / "figures.json", machines=list)
        if not (self.exact and self.machine.items() <= recorded["machines"][-1].items()):
            return [Finding("figures", None, "they were measured on another machine")]
        names = made.figures.keys() - self.trained.keys() - {*NOT_MEASURED}
        expected, figures = ({name: given.get(name) for name in sorted(names)} for given in (recorded, made.figures))
        files = [f"{window.stage}/{name}" for name in made.files if name.endswith((".parquet", ".json"))]
        if self._has_summary:
            files.append("summary.json")
        for name in files:
            expected[name], figures[name] = _content(window.run / name), _content(self.place / name)
        return compare("figures", "measured again", expected, figures)


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_weights(module).items()}


def _content(file: Path) -> Any:
    return read_json(file) if file.suffix == ".json" else read_table(file, ["id"])


def _recorded(window: Window) -> Sequence[Mapping[str, Any]]:
    """Return the machines that made the steps of the window, as the run recorded them; none if it did not.

    Steps after the last checkpoint of an unfinished run are taken for those of the machine that wrote it.
    """
    newest = window.checkpoint(max(window.kept, default=0)) / "state.json"
    file = window.run / window.stage / "figures.json" if window.finished else newest
    return machines_between(read_json(file).get("machines", []), window.start, window.end) if file.exists() else []
