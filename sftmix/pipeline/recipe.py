"""SFTMix from top to bottom: rows -> training dynamics -> confidence -> split -> training -> summary.

Each stage has a function that makes its files and one that reads them back; a person can open them as well.
`RunContext.enter` makes a stage, unless it is done. The reference is in `reference`, the other stages are below.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.batches.order import TrainingOrder
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_confidence, check_split, read_only
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.disk.files import check_room, read_steps, refuse_links
from sftmix.disk.tables import read_split, write_dynamics, write_split, write_table
from sftmix.measure.model import best_evaluation, measure, mixed_share
from sftmix.measure.split import describe_split
from sftmix.measure.summary import made_by, summarise
from sftmix.model.load import model_config
from sftmix.model.rounding import refuse_overflow
from sftmix.pipeline.context import Made, RunContext
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.inputs import Known, config_of_arm, config_of_reference
from sftmix.pipeline.loaded import check_sharing, export_dtype, export_weights, round_weights, scoring_model
from sftmix.pipeline.machines import check_same_directory
from sftmix.pipeline.order import dynamics_before, epochs_begun, losses_of, order_of_arm
from sftmix.pipeline.reference import enter_reference
from sftmix.pipeline.rows import RunRows, read_rows, table_of
from sftmix.pipeline.start import StageName, check_directory, refuse_other_inputs, stages_entered
from sftmix.ranks.world import World, start_world
from sftmix.training.checkpoint import full_weights
from sftmix.training.machine import adding_in_order, machine_of
from sftmix.training.parallel import check_compiler, resolve_precision
from sftmix.training.scoring import held_out_metrics
from sftmix.training.signals import StopAtOnce, StopLater
from sftmix.types import NOT_COUNTED, Scores, Split, TrainingDynamics
from sftmix.words.errors import ConfigError


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
    say_rows   prints the report on the rows, and what computes; a table of runs prints equal ones once
    validated  True: the caller has validated the configuration, as a command line does before torch is imported
    Call it in every process of a torchrun. Raises the errors of `sftmix.words.errors`, which carry the exit codes.
    """
    if not validated:
        validate(config)
    check_directory(config)
    with (
        adding_in_order(config.training.deterministic),  # before CUDA starts, which reads its variable then
        contextlib.nullcontext(world) if world else start_world(config.training.timeout) as ranks,
        StopLater(),  # outside the directory, which notes an error in STATUS.json first
        RunDirectory(config.out or "", ranks, pool=pool) as directory,
        StopAtOnce() as stop,  # inside: what it raises is noted as well
    ):
        ranks.on_main(lambda: refuse_links(directory.path))
        check_same_directory(directory.path, ranks)
        # Asked for: refused before rows are read. auto looks for a compiler when it decides.
        if True in (config.training.compile, config_of_reference(config).training.compile):
            check_compiler(ranks.device)
        directory.tell(stage="data")
        config, rows = read_rows(config, ranks, run=directory.path, progress=ranks.is_main)
        stages = stages_entered(config, until)
        ranks.on_main(lambda: refuse_other_inputs(Known(config, rows=rows), stages, directory.path))
        if ranks.is_main:
            precision = resolve_precision(config.training.precision, ranks.device)
            device = machine_of(ranks, config.training)["device"]
            computing = f"computing in {precision} on {device}; ranks: {ranks.size}"
            say_rows("\n".join([*rows.data.report.lines(), computing]))
            sys.stdout.flush()
        if "train" in stages:
            check_target(config, rows, ranks)
        context = RunContext(config, ranks, directory, stop, rows)
        make_stages(context, stages)
        report, path = rows.data.report, config.model.path
        summary = summarise(directory.path, ranks, report, model=path, seed=config.seed, to=directory.path)
        last = summary["stages"].get(until, {})  # what was asked for, whatever came last
        directory.tell(stage=until, step=last.get("steps", 0), total_steps=last.get("total_steps", 0), doing="")
        return summary


def check_target(config: RunConfig, rows: RunRows, world: World) -> None:
    """Raise ConfigError for what would end the target's training at some step, after its reference was trained."""
    check_sharing(config, world)
    train = rows.data.train
    sizes = dict(zip(train.ids, train.n_targets.tolist(), strict=True))
    layers = getattr(model_config(config.model.path).get_text_config(), "num_hidden_layers", sys.maxsize)
    # Before there are pairs, these are the least steps: groups of unequal size repeat examples.
    order = TrainingOrder(len(train), options=config.training, seed=0)
    if config.is_single_run() and len(order.ends) < 2:
        raise ConfigError(
            f"--reference {config.reference} needs a second epoch, whose pairs are made from the "
            "losses of the first, but training ends before it: raise training.epochs (or training.max_steps)"
        )
    steps = order.total_steps
    world.on_main(lambda: config.objective.check(sizes, packed=train.packed, layers=layers, total_steps=steps))


def make_stages(run: RunContext, stages: Sequence[str]) -> None:
    """Selection -> dynamics -> confidence -> split -> training -> baseline -> base: only the ones in `stages`.

    The table of scores has NaN for the confidence, and there is no split, if these stages do not need them.
    """
    dynamics = None
    scores = table_of(run.rows.data.train)
    split = None
    if "selection" in stages:
        selected = run.path / "selection/selected.parquet"

        def make_selection() -> Made:  # the ids that the selector keeps of all training rows, in file order
            run.world.on_main(lambda: write_table(selected, run.rows.data.train.ids))
            return Made([selected.name])

        run.enter("selection", make_selection)
    if "reference" in stages:
        dynamics = enter_reference(run)
    if "confidence" in stages:
        scores = enter_confidence(run, dynamics)
    if "split" in stages:
        split = enter_split(run, scores)
    if "train" in stages:
        run.enter("train", lambda: make_arm(run, "train", scores, split))
    if "base" in stages and run.config.is_single_run():  # `verify` repeats steps, without "base"
        enter_last_split(run)
    if "baseline" in stages:
        run.enter("baseline", lambda: make_arm(run, "baseline", scores, split))
    if "base" in stages:
        enter_base(run)


# ------------------------------------------------------------------------------------- the short stages


def enter_confidence(run: RunContext, dynamics: TrainingDynamics | None) -> Scores:
    """Make or read the confidence of each example, and with it the table that splitters and samplers see.

    dynamics  None: the confidence has scores of its own, and gets dynamics without losses
    """
    path, estimator = run.path / "confidence/confidence.parquet", run.config.confidence
    train = run.rows.data.train
    nothing = np.full((len(train), 1), np.nan)  # [N, 1]: one checkpoint, at step 0, that knows no loss
    uncounted = np.full(nothing.shape, NOT_COUNTED)
    given = dynamics or TrainingDynamics(train.ids, np.zeros(1, np.int64), nothing, train.n_targets, uncounted)

    def make() -> Made:
        confidence = check_confidence(estimator, estimator.estimate(read_only(given)), given)
        write_table(path, given.ids, confidence=confidence, variability=variability(given))
        return Made([path.name])

    def read() -> Scores:
        return replace(table_of(train, path), states=given.states)

    return run.enter("confidence", lambda: run.world.from_main(make), read)


def enter_split(run: RunContext, scores: Scores) -> Split:
    """Make or read the division of the training examples into groups."""
    splitter, path = run.config.splitter, run.path / "split/split.parquet"

    def make() -> Made:
        split = check_split(splitter, splitter.split(read_only(scores), seed=run.config.seed), scores)
        write_split(path, scores.id, split)
        return Made([path.name, "confounds.json"], describe_split(run.path, scores, split))  # which writes the second

    return run.enter("split", lambda: run.world.from_main(make), lambda: read_split(path, of=scores.id)[1])


# ------------------------------------------------------------------------- the target, its baseline, the base model


def make_arm(run: RunContext, name: str, scores: Scores, split: Split | None) -> Made:
    """Train the target, or the NTP baseline in the same order, and measure and export it, rounded as it is exported.

    name           train or baseline
    scores, split  from the stages before; a single run takes neither, but makes a split for each epoch
    """
    config = config_of_arm(run.config, name)
    rows = run.rows
    directory = run.path / name
    order, split_of = order_of_arm(run, name, scores, split)
    stage = run.training_stage(name, config, rows.encoder, data=rows.data.train, order=order, packed=rows.packed)
    stage.split_of = split_of
    if name == "train" and run.config.is_single_run():
        stage.online = losses_of(run)
    stage.eval_data = rows.data.eval
    dtype = export_dtype(config.model)
    refuse_overflow(stage.model, dtype)  # before the training: 1e5 has no room in float16
    if not config.checkpoint.every:  # an export that finds no room would leave nothing of the training
        size = dtype.itemsize * sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
        run.world.on_main(lambda: check_room(directory, size))
    result = run.train(stage)
    run.directory.tell(doing="measuring the trained model")
    began, steps, module = time.perf_counter(), int(result.figures["steps"]), result.module
    lines = run.world.from_main(lambda: read_steps(directory))
    as_trained = None
    if dtype.itemsize < 4 and rows.data.eval is not None:
        as_trained = lines[-1].get("eval_nll") if lines else None  # of the same weights, by the same scorer
        if as_trained is None:
            as_trained = held_out_metrics(stage.scorer(module, rows.data.eval))["eval_nll"]
    round_weights(config, module, dtype)  # before `measure`: figures are of the weights that are delivered
    files, measured = measure(directory, rows.data, stage.scorer, module, step=steps)
    figures = {
        **result.figures,
        **measured,
        "mixed_token_share": mixed_share(stage.order.batch, lines, rows.data.train.n_targets),
        "eval_nll_as_trained": as_trained,
        **best_evaluation(lines, as_trained or measured.get("eval_nll")),  # not rounded: delivered as trained
        "calibration_seconds": time.perf_counter() - began,
        "made_by": made_by(run.world.size),
    }
    run.directory.tell(doing="writing the model")
    weights, to = full_weights(module), directory / "model"
    run.world.on_main(lambda: export_weights(config, rows.encoder, stage.model, weights, to, dtype))
    files += ["model", "metrics.jsonl", *(["online"] if (directory / "online").exists() else [])]
    nll = f", held-out NLL {measured['eval_nll']:.4f} per token" if "eval_nll" in measured else ""
    return Made(files, figures, f"{name}: {steps} of {figures['total_steps']} steps{nll}")


def enter_last_split(run: RunContext) -> None:
    """Write what divided the last epoch of a single run, for people to look at."""
    if (begun := epochs_begun(run)) == 1:
        run.say("train: stopped in the first epoch, before there was a split")
        return
    last = dynamics_before(run, begun - 1)  # the last epoch begun: epochs count from 0
    run.world.on_main(lambda: write_dynamics(run.path / "confidence/dynamics.parquet", last))
    enter_split(run, enter_confidence(run, last))


def enter_base(run: RunContext) -> None:
    """Measure the untrained model, once for both arms, and last, so that no step waits for it.

    In a QLoRA run this is the quantised model without the adapters.
    """

    def make() -> Made:
        config, rows = run.config, run.rows
        lora, path = config.model.lora.without_adapters(), config.model.path
        score, module = scoring_model(config, run.world, path, rows.encoder, name="base", packed=rows.packed, lora=lora)
        return Made(*measure(run.path / "base", rows.data, score, module))

    run.enter("base", make)
