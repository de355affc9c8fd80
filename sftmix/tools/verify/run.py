"""Stages of a run are made again by the recipe's own functions, in a directory of links to its files, and compared."""

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.components.callbacks import Evaluate
from sftmix.components.component import Need
from sftmix.components.others.mixing import MeasureMixing
from sftmix.config.read import read_yaml
from sftmix.config.wants import Wants
from sftmix.disk.files import BEST, CHECKPOINTS, read_json, read_steps, step_path, verify_directory
from sftmix.disk.known import hashing_anew
from sftmix.disk.regular import refuse_link
from sftmix.measure.summary import made_by, summarise
from sftmix.options.training import CheckpointOptions
from sftmix.pipeline.context import RunContext, StageSpec, Values
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.inputs import Known
from sftmix.pipeline.nodes import check_same_directory
from sftmix.pipeline.recipe import make_stages
from sftmix.pipeline.rows import read_rows, selected_ids
from sftmix.pipeline.stages import BASE, LAST_SPLIT, STAGES
from sftmix.pipeline.start import wanted_stages
from sftmix.pipeline.validity import differences, is_finished
from sftmix.ranks.world import start_world
from sftmix.tools.runs.output import rendered
from sftmix.tools.runs.read import as_started, read_whole, stages_in
from sftmix.tools.verify.content import content_of, figures_by_name, files_beside
from sftmix.tools.verify.findings import ROUNDING, Finding, by_another_version, compare_logs, findings_of
from sftmix.tools.verify.window import Window, same_bits
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import Stage, StageResult, TrainingLoop
from sftmix.training.machine import adding_in_order, flash_kernels, machine_of, of_before
from sftmix.training.signals import StopSignal
from sftmix.words.errors import ConfigError, DataError, DifferenceError

HEAVY = (CHECKPOINTS, BEST, "model")
"""Folders of a finished stage that no later stage reads."""
SUMMARY = "summary.json"
OBSERVED = (Evaluate, MeasureMixing)
"""Callbacks that only watch the steps, but have figures to compare. Others that only watch, such as trackers, are left
out there: they would report the steps a second time. All measure the delivered weights again."""
OF_PROCESS = {"wall_seconds", "elapsed", "calibration_seconds", "scoring_seconds", "mixing_seconds", "compile_seconds"}
OF_PROCESS |= {"peak_memory_bytes", "machines", "made_by", "stopped_by"}
"""Figures of a stage that do not follow from its weights and rows."""


def verify(window: Window, stages: Sequence[StageSpec] = STAGES) -> dict[str, Any]:
    """Replay the steps of a window, compare them with what the run wrote, and return the certificate.

    If files or inputs differ, nothing is replayed, and the certificate says so. Notes and progress go to stderr. Under
    torchrun every rank calls it and returns the same.

    stages  those that the run was given
    Raises ConfigError if this machine cannot compute as the run did,
    and the errors of files and rows that cannot be read.
    """
    with as_started(window.run):
        config = read_whole(window.run)
        with (
            contextlib.redirect_stdout(sys.stderr),  # stdout has the certificate alone, which --json reads
            adding_in_order(config.training.deterministic),
            hashing_anew(),
            start_world(config.training.timeout) as world,
            tempfile.TemporaryDirectory(prefix="sftmix-verify-", ignore_cleanup_errors=True) as scratch,
        ):
            # Ranks may have looked before and after a run saved: the window of rank 0 counts, and its directory.
            window, place = world.share((window, Path(scratch)))
            findings = world.from_main(lambda: check_files(window))
            world.on_main(lambda: lay_out(window, place))
            with RunDirectory(place, world) as directory, StopSignal("at_once") as stop:
                check_same_directory(place, world)
                # with_baseline: other windows do not enter the baseline.
                config = replace(config, out=str(place), with_baseline=window.stage == "baseline")
                config, rows = read_rows(config, world, run=window.run)
                until = "reference" if window.stage == "reference" else "train"
                again = wanted_stages(config, until, [stage for stage in stages if stage not in (LAST_SPLIT, BASE)])
                findings += check_inputs(window, Known(config, world, rows, window.run), again)
                replay = Replay(config, world, directory, stop, rows, window, findings, [], {})
                if all(finding.same for finding in findings):
                    replay.make(again)
                return world.share(replay.certificate())


# ------------------------------------------------------------------------------- what the replay would read


def check_files(window: Window) -> list[Finding]:
    """Compare the outputs of each finished stage, and each checkpoint of the window's stage, with their hashes."""
    problems = {
        f"checkpoint {step}": verify_directory(window.checkpoint(step), within=window.run / window.stage)
        for step in window.checkpoints
    }
    for stage in stages_in(window.run):
        try:
            is_finished(window.run / stage)
        except DifferenceError as error:
            problems[stage] = str(error)
    differing = [Finding("files", False, f"{of}: {why}", False) for of, why in problems.items() if why]
    same = f"outputs of the finished stages and checkpoints of {window.stage}, by their hashes"
    return differing or [Finding("files", True, same)]


def check_inputs(window: Window, known: Known, stages: Sequence[StageSpec]) -> list[Finding]:
    """Compare the inputs that these stages recorded when they began with the current ones."""
    findings = []
    for stage in stages:
        for line in differences(read_json(window.run / stage.name / "inputs.json"), stage.identity(known)):
            # The line is "computed.precision: 'bf16' -> 'fp32'".
            if known.config.training.precision == "auto" and "precision: " in line:
                raise ConfigError(
                    f"training.precision auto is another one here than where {stage.name} was made ({line}), so "
                    "numbers cannot be compared; verify it on a device of the same kind"
                )
            findings.append(Finding("inputs", False, f"{stage.name}: {line}", False))
    names = ", ".join(stage.name for stage in stages)
    return findings or [Finding("inputs", True, f"options, seed, rows and model as {names} recorded")]


def lay_out(window: Window, place: Path) -> None:
    """Link the files that the stages read into the directory `place`, without those after the window's start.

    Each file is a link, but each directory a new one, so that a file made here replaces none of the run.
    """
    for stage in stages_in(window.run):
        for file in filter(Path.is_file, refuse_link(window.run / stage).rglob("*")):
            name = file.relative_to(window.run)
            if name.parts[1] not in HEAVY:
                _link(file, place / name)
    if window.start:
        _link(window.checkpoint(window.start), step_path(place / window.stage / CHECKPOINTS, window.start))


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # it may have been made here
    target.symlink_to(refuse_link(file).absolute())


# ------------------------------------------------------------------------------------------- the replay


@dataclass
class Replay(RunContext):
    """A run of which some stages are made again, and of one of them only the steps of a window.

    findings  only rank 0's count
    recorded  the machines that made the steps in the run; empty before the replay
    machine   the one of the replay; empty before it
    """

    window: Window
    findings: list[Finding]
    recorded: list[dict[str, Any]]
    machine: dict[str, Any]

    def make(self, stages: Sequence[StageSpec]) -> None:
        """Make the stages again, and what is measured of the base model, if the window has all of the training."""
        window = self.window
        try:
            make_stages(self, stages)
        except DataError as error:  # a table of the run has other examples than the rows
            self.findings.append(Finding("split", False, str(error), False))
            return
        if window.stage == "train" and Wants(self.config).single_run:
            self._split_again(LAST_SPLIT.among(stages))
        made = window.stage == "train" and not window.start and (window.run / "base" / "figures.json").exists()
        if self.exact and made:
            BASE.enter(self, {})

    def _split_again(self, stage: StageSpec) -> None:
        """Make confidence and split of a single run again, which are made of its own losses after the training."""
        if self.exact and self.window.finished:
            stage.enter(self, {})
        else:
            why = "of a single run: they are compared on its machine, once it is finished"
            self.findings.append(Finding("split", None, f"confidence and split {why}"))

    def make_or_read(self, stage: StageSpec, values: Values) -> Any:
        """Make a stage again, from the files of the run, and compare what it made.

        Later stages read the files of the run, so that no difference is carried on. Stages with steps are only read
        back, except the window's, which is the last.
        """
        window, world = self.window, self.world
        if stage.name != window.stage:
            if not stage.has_steps:
                made = stage.make_on_ranks(self, values)
                files = [f"{stage.name}/{file}" for file in made.files]
                world.on_main(lambda: self._compare_made(stage.name, files, made.figures, stage.name))
            return stage.read(self, values)
        self.recorded = [*map(of_before, window.machines)]
        if self.recorded:  # as many threads as the run had: they decide how sums are rounded
            torch.set_num_threads(self.recorded[0]["threads"])
        made = stage.make_on_ranks(self, values)
        online = [f"online/{file.name}" for file in sorted((window.run / stage.name / "online").glob("*.parquet"))]
        files = [f"{stage.name}/{name}" for name in [*made.files, *online] if name.endswith((".parquet", ".json"))]
        if window.finished and (window.run / "base" / "figures.json").exists():  # the last stage: all have figures
            summarise(window.run, world, self.rows.data.report, self.config, to=self.directory.path)
            files.append(SUMMARY)
        world.on_main(lambda: self._compare_outputs(made.figures, files))

    def train(self, stage: Stage) -> StageResult:
        """Train the steps of the window; then load the run's last weights, if it kept them, to be measured."""
        window, world, recorded = self.window, self.world, self.window.run / self.window.stage

        class StopAfter(Callback):
            """The end of a replay."""

            def on_step_end(self, state: StageState) -> CallbackResult:
                return CallbackResult(stop=state.step >= window.end)

        # Need.STOP: what may end a training decides how many steps there are.
        watching = [one for one in stage.callbacks if isinstance(one, OBSERVED) or Need.STOP in one.gives]
        unsaved = CheckpointOptions(every=0, keep=2)  # 2: the linked checkpoint stays
        remade = replace(stage, callbacks=[*watching, StopAfter()], checkpoint=unsaved)
        with flash_kernels(stage.options.flash_kernels, world.device):
            loop = TrainingLoop(remade, world, self.recorded)  # what was chosen there; a checkpoint has it as well
            result = loop.run()
        self.machine = machine_of(world, loop.stage.options)
        self.exact = same_bits(self.recorded, self.machine)
        self.trained = result.figures
        precision = None if self.exact else loop.setup.precision

        def compare_steps() -> None:
            steps = range(window.start + 1, window.end + 1)
            self.findings += compare_logs(read_steps(recorded), read_steps(stage.directory), steps, precision)
            # The log of all steps: the best evaluation may be outside the window.
            _link(recorded / "metrics.jsonl", stage.directory / "metrics.jsonl")

        world.on_main(compare_steps)
        replayed = {name: tensor.clone() for name, tensor in full_weights(loop.module).items()}
        loop.store.directory = recorded / CHECKPOINTS  # not the links, of which there is one
        # the run's weights of the window's end, to compare, and its last ones, to measure
        for step in sorted({window.end, window.last} & {*window.checkpoints}):
            loop.store.load(step, loop.module, None)
            if step == window.end and self.exact:  # elsewhere they are rounded in another way
                name = f"{CHECKPOINTS}/{window.checkpoint(step).name}"
                self.findings += findings_of("weights", name, full_weights(loop.module), replayed)
        # What is measured next is of the last weights, wherever the window ends.
        return replace(result, figures={**result.figures, "steps": window.last})

    def _compare_made(self, stage: str, files: Sequence[str], figures: Mapping[str, Any], where: str) -> None:
        """Compare files and figures that were made again; later stages read the run's files."""
        run, here, trained = self.window.run, self.directory.path, stage == self.window.stage
        relative = 0.0 if trained else ROUNDING
        recorded = read_json(run / stage / "figures.json")
        # A training that was made in part has fewer figures than the run; other stages must have all of them.
        names = (figures if trained else {**recorded, **figures}).keys() - OF_PROCESS
        expected, replayed = (
            figures_by_name({name: of.get(name) for name in sorted(names)}) for of in (recorded, figures)
        )
        self.findings += findings_of("figures", where, expected, replayed, dict.fromkeys(replayed, relative))
        for name in files:
            expected, replayed = content_of(run / name), content_of(here / name)
            if name == SUMMARY:  # the model's name is the run's, wherever it is now: `inputs` compare its files
                replayed["model"] = read_yaml(run / "config.yaml").get("model", {}).get("path")
            if stage == "selection":  # the rows here are those that the run selected: select from all rows
                replayed = {"id": pd.Series(selected_ids(self.config, self.rows.whole))}
            kind = "split" if name.endswith(".parquet") and stage != "base" and not trained else "figures"
            place = "summary.json, gathered again from the figures of the run's stages" if name == SUMMARY else name
            self.findings += findings_of(kind, place, expected, replayed, dict.fromkeys(replayed, relative))
            _link(run / name, here / name)  # the next stage reads the run's

    def _compare_outputs(self, measured: Mapping[str, Any], files: Sequence[str]) -> None:
        """Compare the exported model, what the stage measured of the last weights, and the summary, gathered again."""
        window = self.window
        # held: a checkpoint has the weights that the run exported, and they were exported again from it.
        held, at_end = window.last in window.checkpoints, window.end == window.last
        self._compare_model(f"{window.stage}/model", held=held, at_end=at_end)
        if self.exact and window.finished and (window.stage == "reference" or held or at_end):
            in_part = window.start > 0 or not at_end  # it has counted its own steps alone
            compared = measured.keys() - (self.trained.keys() if in_part else set())  # what training steps have counted
            measured = {name: value for name, value in measured.items() if name in compared}
            self._compare_made(window.stage, files, measured, "measured again")

    def _compare_model(self, name: str, *, held: bool, at_end: bool) -> None:
        """Compare an exported model with the one that was exported here; say what is not compared."""
        window, findings = self.window, self.findings
        place, here = window.run / name, self.directory.path / name
        model = content_of(place)
        if not self.exact:
            findings.append(Finding("weights", None, "another machine rounds them, and figures, in another way"))
        elif window.end not in window.checkpoints and not (model and at_end):
            findings.append(Finding("weights", None, f"the run kept none of step {window.end} as they were trained"))
        if model and (held or (at_end and self.exact)):
            findings += findings_of("model" if held else "weights", name, model, content_of(here))
            if self.exact:  # other libraries write other files
                beside = findings_of("model", f"{name}, beside the weights", files_beside(place), files_beside(here))
                findings += beside if self._of_this_version() else map(by_another_version, beside)
        elif model:
            what = f"{name}: step {window.last} has no checkpoint; a window up to this step compares it"
            findings.append(Finding("model", None, what))

    def _of_this_version(self) -> bool:
        """Return True if the version of this process made the stage, which also writes the files beside the weights."""
        made = read_json(self.window.run / self.window.stage / "figures.json").get("made_by", {})
        return made_by(made.get("world_size", 1)) == made

    def certificate(self) -> dict[str, Any]:
        """Return all findings about the steps of the window, as `--json` prints them.

        In it `exact` is True if everything was compared and is the same, bit for bit.
        """
        window, findings, different = self.window, self.findings, []
        for name, value in self.machine.items():
            others = dict.fromkeys(machine.get(name) for machine in self.recorded)  # each once
            different += [f"{name} is {other} in the run and {value} here" for other in others if other != value]
        told = {"window": window, "findings": findings, "different": different}
        return {
            "run": str(window.run),
            "stage": window.stage,
            "from": window.start,
            "to": window.end,
            "same": all(finding.same is not False for finding in findings),  # None: not compared
            "exact": all(finding.same and finding.exact for finding in findings),
            "machine": {"run": self.recorded, "replay": self.machine, "different": different},
            "findings": [finding._asdict() for finding in findings],
            "sentence": rendered("verify/sentence.txt", **told),
        }
