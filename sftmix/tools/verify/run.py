"""Stages of a run, made again by the recipe's own functions in a copy of its directory, and compared with it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sftmix.common.checkpoints import BEST, CHECKPOINTS, step_path
from sftmix.common.errors import ConfigError
from sftmix.common.files import MANIFEST, read_json, sha256_file, verify_directory
from sftmix.common.tables import read_table, write_table
from sftmix.common.world import start_world
from sftmix.components.base import Callback, CallbackResult, Need, StageState
from sftmix.components.callbacks import Evaluate
from sftmix.components.mixing import MeasureMixing
from sftmix.config.read import read_config
from sftmix.pipeline.context import RunContext, Stage
from sftmix.pipeline.directory import RunDirectory, check_same_directory, differences
from sftmix.pipeline.identity import ALL, STAGE_INPUTS, Known, stages_entered
from sftmix.pipeline.recipe import make_stages, write_summary
from sftmix.pipeline.rows import read_rows, selected_ids
from sftmix.tools.verify.findings import (
    OF_CONFIDENCE,
    Certificate,
    Finding,
    compare,
    compare_logs,
    rounded,
    tensors_in,
)
from sftmix.tools.verify.window import TRAINED, Window, logged_steps
from sftmix.training.checkpoint import full_weights
from sftmix.training.log import StopAtOnce
from sftmix.training.loop import Stage as TrainingStage
from sftmix.training.loop import StageResult, TrainingLoop
from sftmix.training.machine import machine_of, machines_between, same_bits

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
    with (
        contextlib.redirect_stdout(sys.stderr),
        start_world(config.training.timeout) as world,
        tempfile.TemporaryDirectory(prefix="sftmix-verify-", ignore_cleanup_errors=True) as scratch,
    ):
        # A run that goes on may have saved since the other ranks looked. All share the directory of rank 0.
        window, place = world.share((window, Path(scratch)))
        findings = world.share(world.on_main(lambda: check_files(window)))
        world.on_main(lambda: lay_out(window, place))
        with RunDirectory(place, world) as directory, StopAtOnce() as stop:
            check_same_directory(place, world)
            config, rows = read_rows(replace(config, out=str(place)), world, run=window.run, progress=world.is_main)
            entered = stages_entered(config, "reference" if window.stage == "reference" else "train")
            stages = [stage for stage in entered if stage != "base"]
            findings += check_inputs(window, Known(config, world, rows, window.run), stages)
            replay = Replay(window, findings, config, world, directory, stop, rows)
            if any(finding.same is False for finding in findings):
                findings.append(Finding("losses", None, "what the replay would read differs already"))
            else:
                make_stages(replay, stages)
            world.barrier()
            return world.share(Certificate(window, replay.findings, replay.recorded, replay.machine))


# ------------------------------------------------------------------------------- what the replay would read


def check_files(window: Window) -> list[Finding]:
    """Compare every output of the finished stages, and every checkpoint of the window's stage, with its hash."""
    manifests = [file for stage in ALL if (file := window.run / stage / MANIFEST).exists()]
    outputs = [(m.parent / name, h) for m in manifests for name, h in read_json(m, files=dict)["files"].items()]
    digests = [sha256_file(file) if file.is_file() else "no file" for file, _ in outputs]
    findings = [
        Finding("files", False, str(file.resolve()), False, expected, digest)
        for (file, expected), digest in zip(outputs, digests, strict=True)
        if digest != expected
    ]
    problems = {step: verify_directory(window.checkpoint(step)) for step in window.checkpoints}
    findings += [Finding("files", False, f"checkpoint {step}: {why}", False) for step, why in problems.items() if why]
    what = f"{len(outputs)} outputs of finished stages and {len(problems)} checkpoints of {window.stage}"
    findings = findings or [Finding("files", True, f"{what}, by their hashes")]
    if not window.place.is_dir():
        findings.append(Finding("files", None, f"checkpoints: {window.place}, where the stage was made, is gone"))
    return findings


def check_inputs(window: Window, known: Known, stages: Sequence[str]) -> list[Finding]:
    """Compare what these stages recorded when they began with what configuration, rows and models are now."""
    findings = []
    for stage in stages:
        for line in differences(read_json(window.run / stage / "inputs.json"), STAGE_INPUTS[stage](known)):
            if known.config.training.precision == "auto" and "precision: " in line:
                raise ConfigError(
                    f"training.precision auto is another one here than where {stage} was made ({line}), so numbers "
                    "cannot be compared; verify it on a device of the same kind"
                )
            findings.append(Finding("inputs", False, f"{stage}: {line}", False))
    return findings or [Finding("inputs", True, f"options, seed, rows and model as {', '.join(stages)} recorded")]


def lay_out(window: Window, place: Path) -> None:
    """Link the files that the stages read into a directory, without what came after the window's start.

    They are links of single files, in directories of their own, so that a file made here replaces none of the run.
    """
    for stage in ALL:
        # The checkpoints of the window's stage hold the hash of the inputs as they were where the stage was made.
        for source in (window.run / stage, *([window.place] if stage == window.stage else [])):
            for file in source.rglob("*"):
                name = file.relative_to(source)
                if file.is_file() and name.parts[0] not in HEAVY:
                    _link(file, place / stage / name)
    if window.start:
        _link(window.checkpoint(window.start), step_path(place / window.stage / CHECKPOINTS, window.start))
    for step in range(window.start + 1, window.end + 1):
        (place / window.stage / "scores" / f"step-{step:08d}.parquet").unlink(missing_ok=True)


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

    findings  those of rank 0 count
    recorded  the machines that made the steps in the run, and machine, the one of the replay; empty before it
    """

    def __init__(self, window: Window, findings: list[Finding], *context: Any) -> None:
        super().__init__(*context)
        self.window, self.place, self.findings = window, self.directory.path, findings
        self.recorded, self.machine = list[dict[str, Any]](), dict[str, Any]()

    def enter(self, stage: Stage) -> Any:
        """Make a stage again, from the files of the run, and compare what it made.

        Later stages read the files of the run, so that each differs alone. Other stages with steps are read back;
        nothing comes after that of the window.
        """
        if stage.name == self.window.stage:
            self._make(stage)
            return None
        if stage.name in TRAINED:
            return stage.read()
        name = f"{stage.name}/{stage.make().files[0]}"
        if stage.name == "selection":  # the rows are those that the run selected
            ids = selected_ids(self.config, self.rows.whole)
            self.world.on_main(lambda: write_table(self.place / name, ids))
        self.findings += self.world.on_main(lambda: self._table(name)) or []
        return stage.read()

    def _table(self, name: str) -> list[Finding]:
        tables = [read_table(root / name, ["id"]) for root in (self.window.run, self.place)]
        expected, replayed = (table.to_pydict() for table in tables)
        _link(self.window.run / name, self.place / name)
        return compare("split", name, expected, replayed, relative=OF_CONFIDENCE, labels=expected["id"])

    def _make(self, stage: Stage) -> None:
        self.recorded = self.world.share(self.world.on_main(lambda: _recorded(self.window)))
        threads = torch.get_num_threads()
        try:  # sums of another number of parts are rounded differently
            torch.set_num_threads(self.recorded[0]["threads"] if self.recorded else threads)
            remade = stage.make()
        finally:
            torch.set_num_threads(threads)
        # After the last stage, so that the summary tells of all.
        has_summary = self.window.finished and (self.window.run / "base" / "figures.json").exists()
        if has_summary:
            write_summary(self, root=self.window.run)
        files = [f"{stage.name}/{name}" for name in remade.files if name.endswith((".parquet", ".json"))]
        files += ["summary.json"] * has_summary
        self.findings += self.world.on_main(lambda: [*self._weights(), *self._figures(remade.figures, files)]) or []

    def train(self, stage: TrainingStage) -> StageResult:
        """Train the steps of the window; then load the run's last weights, if it kept them, to be measured."""
        window, world = self.window, self.world
        watching = [one for one in stage.callbacks if isinstance(one, OBSERVED) or Need.STOP in one.gives]
        unsaved = replace(stage.checkpoint, every=0, keep_best=False, keep=2)  # 2: the link is never pruned
        self.machine = machine_of(world, stage.options)
        self.exact = same_bits(self.recorded, self.machine)
        loop = TrainingLoop(replace(stage, callbacks=[*watching, StopAfter(window.end)], checkpoint=unsaved), world)
        result = loop.run()
        self.weights = self.expected = _copied(loop.module)
        self.trained = result.figures
        relative = None if self.exact else rounded(loop.setup.precision)

        def compare_steps() -> None:
            logs, steps = (window.logged, logged_steps(stage.directory)), range(window.start + 1, window.end + 1)
            self.findings += compare_logs(*logs, steps, relative=relative)
            _link(window.file("metrics.jsonl"), stage.directory / "metrics.jsonl")

        world.on_main(compare_steps)
        loop.store.directory = window.place / CHECKPOINTS
        for step in sorted({window.end, window.last} & {*window.checkpoints}):
            loop.store.load(step, loop.module, None)
            self.expected = _copied(loop.module) if step == window.end else self.expected
        return replace(result, figures={**result.figures, "steps": window.last})

    def _weights(self) -> list[Finding]:
        """Compare the weights after the window, and the exported model with the last checkpoint or the replay."""
        window, model, findings = self.window, f"{self.window.stage}/model", list[Finding]()
        stored, remade = tensors_in(window.run / model), tensors_in(self.place / model)
        held = window.last in window.checkpoints
        replayed = self.exact and not held and window.end == window.last
        if not self.exact:
            findings.append(Finding("weights", None, "another machine rounds them in another way"))
        elif window.end in window.checkpoints:
            name = f"{CHECKPOINTS}/{window.checkpoint(window.end).name}"
            findings += compare("weights", name, self.expected, self.weights)
        elif not (stored and replayed):
            findings.append(Finding("weights", None, f"the run kept none of step {window.end} as they were trained"))
        if stored and (held or replayed):
            findings += compare("model" if held else "weights", model, stored, remade)
        elif stored:
            what = f"{model}: step {window.last} has no checkpoint; a window up to this step compares it"
            findings.append(Finding("model", None, what))
        return findings

    def _figures(self, measured: Mapping[str, Any], files: Sequence[str]) -> list[Finding]:
        """Compare what the stage measured of the last weights, and the summary, gathered again."""
        window = self.window
        whole = window.stage == "reference" or window.last in (window.end, *window.checkpoints)
        if not (window.finished and whole):
            return []
        recorded = read_json(window.run / window.stage / "figures.json", machines=list)
        if not (self.exact and self.machine.items() <= recorded["machines"][-1].items()):
            return [Finding("figures", None, "they were measured on another machine")]
        names = sorted(measured.keys() - self.trained.keys() - {*NOT_MEASURED})
        expected, figures = (
            {name: figures.get(name) for name in names} | {name: _content(root / name) for name in files}
            for figures, root in ((recorded, window.run), (measured, self.place))
        )
        return compare("figures", "measured again", expected, figures)


def _copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_weights(module).items()}


def _content(file: Path) -> Any:
    return read_json(file) if file.suffix == ".json" else read_table(file, ["id"])


def _recorded(window: Window) -> list[dict[str, Any]]:
    """Return the machines that made the steps of the window, as the run recorded them; none if it did not.

    Steps after the last checkpoint of an unfinished run are taken for those of the machine that wrote it.
    """
    newest = window.checkpoint(max(window.checkpoints, default=0)) / "state.json"
    file = window.run / window.stage / "figures.json" if window.finished else newest
    return machines_between(read_json(file).get("machines", []), window.start, window.end) if file.exists() else []
