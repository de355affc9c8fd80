"""SFTMix from top to bottom: rows -> training dynamics -> confidence -> split -> training -> summary.

Each stage is a `Stage`: what makes its files, and what reads them back; a person can open them, too. `RunContext.enter`
makes one, unless it is done. The short stages are below; the reference is in `reference`, training
and measuring the target in `target`.
"""

import contextlib
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.tables import read_split, write_split, write_table
from sftmix.common.world import World, start_world
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_confidence, check_split
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.measure.split import describe_split
from sftmix.measure.summary import summarise
from sftmix.pipeline.context import Made, RunContext, Stage
from sftmix.pipeline.directory import RunDirectory, check_same_directory
from sftmix.pipeline.identity import Known, StageName, is_single_run, stages_entered, training_of_reference
from sftmix.pipeline.reference import reference_stage
from sftmix.pipeline.rows import read_rows
from sftmix.pipeline.start import refuse_other_inputs
from sftmix.pipeline.target import arm_stage, base_stage, dynamics_of_single_run
from sftmix.training.log import StopAtOnce
from sftmix.training.module import check_compiler
from sftmix.types import NOT_COUNTED, Scores, TrainingDynamics


def run(
    config: RunConfig,
    *,
    until: StageName = "train",
    world: World | None = None,
    pool: Sequence[Path] = (),
    say_rows: Callable[[str], object] = print,
    validated: bool = False,
) -> dict[str, Any]:
    """Run all stages up to one, resume those that were begun, and return the summary.

    world      the ranks, if their process group exists already; None: as torchrun announces them
    pool       other run directories; a stage that they finished from the same inputs is adopted, not made again
    say_rows   prints the report on the rows; a table of runs prints equal ones once
    validated  True: the caller has validated the configuration, as a command line does before torch is imported
    Call it in every process of a torchrun. Raises the errors of `sftmix.common.errors`, which carry the exit codes.
    """
    if not validated:
        validate(config)
    with (
        contextlib.nullcontext(world) if world else start_world(config.training.timeout) as ranks,
        RunDirectory(config.out or "", ranks, pool=pool) as directory,
        StopAtOnce() as stop,
    ):
        check_same_directory(directory.path, ranks)
        if config.training.compile or training_of_reference(config)[0].compile:
            check_compiler(ranks.device)
        directory.tell(stage="data")
        config, rows = read_rows(config, ranks, run=directory.path, progress=ranks.is_main)
        stages = stages_entered(config, until)
        refuse_other_inputs(Known(config, ranks, rows), stages, directory.path)  # before anything is made
        if ranks.is_main:
            say_rows("\n".join(rows.data.report.lines()))
            sys.stdout.flush()
        context = RunContext(config, ranks, directory, stop, rows)
        make_stages(context, stages)
        summary = write_summary(context)
        last = summary["stages"].get(until, {})  # what was asked for, whatever came last
        directory.tell(stage=until, step=last.get("steps", 0), total_steps=last.get("total_steps", 0), doing="")
        return summary


def make_stages(run: RunContext, stages: Container[str]) -> None:
    """Selection -> dynamics -> confidence -> split -> training -> baseline -> base: those of `stages`.

    The table of scores has NaN for the confidence, and there is no split, where these stages do not need them.
    """
    dynamics, scores, split = None, run.rows.table(), None
    if "selection" in stages:
        run.enter(selection_stage(run))
    if "reference" in stages:
        dynamics = run.enter(reference_stage(run))
    if "confidence" in stages:
        scores = run.enter(confidence_stage(run, dynamics))
    if "split" in stages:
        split = run.enter(split_stage(run, scores))
    if "train" in stages:
        run.enter(arm_stage(run, "train", scores, split))
    if "base" in stages and is_single_run(run.config):
        dynamics = dynamics_of_single_run(run)
        if dynamics is not None:  # those that divided the last epoch, for people to look at
            run.enter(split_stage(run, run.enter(confidence_stage(run, dynamics))))
    if "baseline" in stages:
        run.enter(arm_stage(run, "baseline", scores, split))
    if "base" in stages:
        run.enter(base_stage(run))


def write_summary(run: RunContext, *, root: Path | None = None) -> dict[str, Any]:
    """Gather the figures of all stages into summary.json in the run's directory; return them.

    root  another run directory whose figures count; None: the run's own
    """
    config, report = run.config, run.rows.data.report
    return summarise(root or run.path, run.world, report, model=config.model.path, seed=config.seed, to=run.path)


# ------------------------------------------------------------------------------------- the short stages


def selection_stage(run: RunContext) -> Stage:
    """The ids that the selector keeps of all training rows, in file order."""
    path = run.path / "selection" / "selected.parquet"

    def make() -> Made:
        write_table(path, run.rows.data.train.ids)
        return Made([path.name])

    return Stage("selection", lambda: run.world.from_main(make))


def confidence_stage(run: RunContext, dynamics: TrainingDynamics | None) -> Stage:
    """The confidence of each example, and with it the table that splitters and samplers see.

    dynamics  None: the confidence has scores of its own, and gets dynamics without losses
    """
    path, estimator = run.path / "confidence" / "confidence.parquet", run.config.confidence
    train = run.rows.data.train
    nothing = np.full((len(train), 1), np.nan)
    uncounted = np.full(nothing.shape, NOT_COUNTED)
    given = dynamics or TrainingDynamics(train.ids, np.zeros(1, np.int64), nothing, train.n_targets, uncounted)

    def make() -> Made:
        confidence = check_confidence(estimator, estimator.estimate(given), given)
        write_table(path, given.ids, confidence=confidence, variability=variability(given))
        return Made([path.name])

    return Stage("confidence", lambda: run.world.from_main(make), lambda: run.rows.table(path))


def split_stage(run: RunContext, scores: Scores) -> Stage:
    """The division of the training examples into groups."""
    splitter, path = run.config.splitter, run.path / "split" / "split.parquet"

    def make() -> Made:
        split = check_split(splitter, splitter.split(scores, seed=run.config.seed), scores)
        write_split(path, scores.id, split)
        files, figures = describe_split(run.path, scores, split)
        return Made([path.name, *files], figures)

    return Stage("split", lambda: run.world.from_main(make), lambda: read_split(path)[1])
