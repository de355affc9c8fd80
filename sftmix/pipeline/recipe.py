"""SFTMix from top to bottom: rows -> training dynamics -> confidence -> split -> training -> summary.

Each stage is one function. It names its inputs (`inputs`), makes its files unless they are there (`begin`), records
them with its figures (`finish`), and reads them back; a person can open them, too. The short stages are below; the
reference is in `reference`, training and measuring the target in `target`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from sftmix.batches.order import EpochPairs, no_pairs, one_split
from sftmix.common.tables import read_ids, read_split, write_confidence, write_ids, write_split
from sftmix.common.world import World, start_world
from sftmix.components.base import Need
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_confidence, check_split
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.data import EncodedDataset
from sftmix.measure.split import ties_at_the_cut, write_confounds
from sftmix.measure.summary import summarise
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.identity import Known, confidence_inputs, selection_inputs, split_inputs
from sftmix.pipeline.reference import reference_dynamics, refuse_responses_of_text
from sftmix.pipeline.rehearsal import rehearse
from sftmix.pipeline.rows import RunRows, read_rows, selected_ids, tokenised_rows
from sftmix.pipeline.single_run import after_single_run, splits_of_single_run
from sftmix.pipeline.stages import StageName, stages_needed, training_of_reference
from sftmix.pipeline.start import refuse_other_inputs
from sftmix.pipeline.target import measure_base, train_arm
from sftmix.training.log import StopAtOnce
from sftmix.training.parallel import check_compiler
from sftmix.types import Scores, Split, TrainingDynamics


def run(
    config: RunConfig,
    *,
    until: StageName = "train",
    world: World | None = None,
    pool: Sequence[Path] = (),
    say_rows: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Run all stages up to one, resume those that were begun, and return the summary.

    world     the ranks, if their process group exists already; None: as torchrun announces them
    pool      other run directories; a stage that they finished from the same inputs is adopted, not made again
    say_rows  prints the report on the rows; a table of runs prints equal ones once
    Call it in every process of a torchrun. Raises the errors of `sftmix.common.errors`, which carry the exit codes.
    """
    validate(config)
    assert config.out is not None
    with (
        contextlib.nullcontext(world) if world else start_world(config.training.timeout) as ranks,
        RunDirectory(config.out, ranks, pool=pool) as directory,
        StopAtOnce() as stop,
    ):
        if config.training.compile or training_of_reference(config)[0].compile:
            check_compiler(ranks.device)
        return recipe(config, until, ranks, directory, stop, say_rows)


def recipe(
    config: RunConfig,
    until: StageName,
    world: World,
    directory: RunDirectory,
    stop: StopAtOnce,
    say_rows: Callable[[str], object],
) -> dict[str, Any]:
    """Rows -> dynamics -> confidence -> split -> training -> baseline -> base -> summary, as far as `until` needs."""
    world.on_main(lambda: refuse_other_inputs(Known(config), until, directory.path))
    directory.tell(stage="data")
    config, prepared = read_rows(config, world, progress=world.is_main)
    run = RunContext(config, world, directory, stop)
    stages = stages_needed(config, until)

    select = Selection(run)
    rows = tokenised_rows(config, prepared, world, select=select.ids, progress=world.is_main)
    refuse_other_inputs(Known(config, world, rows), until, directory.path)  # before anything is made
    select.keep()
    if world.is_main:
        say_rows("\n".join(rows.data.report.lines()))
        sys.stdout.flush()
    if "reference" in stages and not directory.has("reference"):
        refuse_responses_of_text(config, rows)
        if len(stages) > 1 and Need.TRAINING in config.reference.needs:
            world.on_main(lambda: rehearse(run, rows, stages))
    dynamics, scores, split = make_stages(run, rows, stages)
    if "train" in stages:
        measure_base(run, rows)
    if split is None and directory.has("split"):  # an earlier command made it, and the summary tells of it
        scores = rows.table()
        if Need.CONFIDENCE in config.splitter.needs:
            scores = confidence_scores(run, rows, dynamics or reference_dynamics(run, rows))
        split = make_split(run, rows, scores)
    summary = summarise(
        directory.path,
        world,
        rows.data,
        scores,
        split,
        model=config.model.path,
        seed=config.seed,
    )
    done = summary["stages"].get(until, {})  # what was asked for, whatever came last
    step, total = (int(done.get(key, 0)) for key in ("steps", "total_steps"))
    directory.tell(stage=until, step=step, total_steps=total, doing="")
    return summary


def make_stages(
    run: RunContext, rows: RunRows, stages: Container[str]
) -> tuple[TrainingDynamics | None, Scores, Split | None]:
    """Dynamics -> confidence -> split -> training -> baseline: make those of `stages`, and return the first three.

    Dynamics and split are None, and the confidence of the scores is NaN, where these stages do not need them.
    """
    dynamics = reference_dynamics(run, rows) if "reference" in stages else None
    scores = confidence_scores(run, rows, dynamics if "confidence" in stages else None)
    split = make_split(run, rows, scores) if "split" in stages else None
    if "train" not in stages:
        return dynamics, scores, split

    single = splits_of_single_run(run, rows)  # None: the pairs of all epochs are known by now
    pairs = epoch_pairs(run, scores, split) if single is None else single.pairs()
    train_arm(run, rows, "train", pairs, online=None if single is None else single.losses)
    if single is not None:
        pairs, dynamics = after_single_run(run, rows, single)
        if dynamics is not None:  # those that divided the last epoch, for people to look at
            scores = confidence_scores(run, rows, dynamics)
            split = make_split(run, rows, scores)
    if run.config.with_baseline:
        train_arm(run, rows, "baseline", pairs)
    return dynamics, scores, split


# ------------------------------------------------------------------------------------- the short stages


class Selection:
    """The selector's stage: `ids` chooses and writes nothing; `keep` writes, once the later stages are accepted."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._path = run.directory.path / "selection" / "selected.parquet"
        self._inputs: dict[str, Any] | None = None
        self._ids: list[str] = []

    def ids(self, rows: EncodedDataset) -> list[str]:
        """Return the ids that the selector keeps, in file order: those of the finished stage, or a new choice."""
        run = self._run
        self._inputs = selection_inputs(run.known(None), rows.fingerprint)
        if run.directory.is_done("selection", self._inputs):
            self._ids = read_ids(self._path)
        else:
            self._ids = run.world.share(run.world.on_main(lambda: selected_ids(run.config, rows)))
        return self._ids

    def keep(self) -> None:
        """Make the stage of the ids, if there is a selector."""
        run = self._run
        if self._inputs is not None and not run.begin("selection", self._inputs):
            run.world.on_main(lambda: write_ids(self._path, self._ids))
            run.finish("selection", ["selected.parquet"], {})


def confidence_scores(run: RunContext, rows: RunRows, dynamics: TrainingDynamics | None) -> Scores:
    """Return the table that splitters and samplers see; its confidence is NaN without dynamics."""
    if dynamics is None:
        return rows.table()
    folder, estimator = run.directory.path / "confidence", run.config.confidence
    path = folder / "confidence.parquet"

    def write() -> None:
        confidence = check_confidence(estimator, estimator.estimate(dynamics), dynamics)
        write_confidence(path, dynamics.ids, confidence, variability(dynamics))

    if not run.begin("confidence", confidence_inputs(run.known(rows))):
        run.world.on_main(write)
        run.finish("confidence", ["confidence.parquet"], {"wall_seconds": run.seconds()})
    return rows.table(path)


def make_split(run: RunContext, rows: RunRows, scores: Scores) -> Split:
    """Divide the training examples into groups, or read back how they were divided."""
    root, splitter, seed = run.directory.path, run.config.splitter, run.config.seed
    path = root / "split" / "split.parquet"

    def write() -> None:
        write_split(path, scores.id, check_split(splitter, splitter.split(scores, seed=seed), scores))

    if not run.begin("split", split_inputs(run.known(rows))):
        run.world.on_main(write)
        made = read_split(path)[1]
        files = run.world.on_main(lambda: write_confounds(root, scores, made, rows.data.train))
        run.finish("split", ["split.parquet", *(files or [])], {"wall_seconds": run.seconds()})
        run.say(f"split: {', '.join(f'{name} {len(made.rows(g)):,}' for g, name in enumerate(made.names))}")
        for remark in ties_at_the_cut(scores, made):
            run.say(f"note: {remark}")
    return read_split(path)[1]


def epoch_pairs(run: RunContext, scores: Scores, split: Split | None) -> EpochPairs:
    """Return the pairs of every epoch; shuffled singles if nothing is paired."""
    if run.pairing is None or split is None:
        return no_pairs()
    return one_split(split, scores, run.pairing, run.config.seed)
