"""SFTMix from top to bottom: rows -> training dynamics -> confidence -> split -> training -> summary.

Each stage is a record (`sftmix.pipeline.stages`) that says what its files are made from, and how they are made and read
back; a person can open them as well. `RunContext.make_or_read` makes a stage, unless it is done.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sftmix.batches.order import TrainingOrder
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.wants import Wants
from sftmix.measure.summary import summarise
from sftmix.model.load import model_config
from sftmix.pipeline.context import RunContext, StageSpec, Values, refuse_other_inputs
from sftmix.pipeline.directory import RunDirectory
from sftmix.pipeline.inputs import Known, config_of_reference
from sftmix.pipeline.loaded import check_sharing
from sftmix.pipeline.nodes import check_same_directory
from sftmix.pipeline.rows import RunRows, read_rows, table_of
from sftmix.pipeline.stages import STAGES
from sftmix.pipeline.start import as_begun, check_directory, wanted_stages
from sftmix.ranks.world import World, start_world
from sftmix.training.machine import adding_in_order, machine_of
from sftmix.training.parallel import check_compiler, resolve_precision
from sftmix.training.signals import StopSignal
from sftmix.words.errors import ConfigError


def run(
    config: RunConfig,
    *,
    until: str = "train",
    stages: Sequence[StageSpec] = STAGES,
    world: World | None = None,
    pool: Sequence[Path] = (),
    say_rows: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Run all stages up to one, resume those that were begun, and return the summary.

    until      the name of the last stage: reference, confidence, split or train
    stages     in their order; add one of your own to the default ones
    world      the ranks, if their process group exists already; None: as torchrun announces them
    pool       other run directories; a stage that they finished from the same inputs is adopted, not made again
    say_rows   prints the report on the rows, and what computes; a table of runs prints equal ones once
    Call it in every process of a torchrun. Raises the errors of `sftmix.words.errors`, which carry the exit codes.
    """
    validate(config)
    check_directory(config, stages)
    with (
        as_begun(Path(config.out or "")),
        adding_in_order(config.training.deterministic),  # before CUDA starts, which reads its variable then
        contextlib.nullcontext(world) if world else start_world(config.training.timeout) as ranks,
        StopSignal("later"),  # outside the directory, which notes an error in STATUS.json first
        RunDirectory(config.out or "", ranks, pool=pool) as directory,
        StopSignal("at_once") as stop,  # inside: what it raises is noted as well
    ):
        check_same_directory(directory.path, ranks)
        # Asked for: refused before rows are read. auto looks for a compiler when it decides.
        if True in (config.training.compile, config_of_reference(config).training.compile):
            check_compiler(ranks.device)
        directory.tell(stage="data")
        config, rows = read_rows(config, ranks, run=directory.path)
        chosen = wanted_stages(config, until, stages)
        ranks.on_main(lambda: refuse_other_inputs(Known(config, rows=rows), chosen, directory.path))
        if ranks.is_main:
            precision = resolve_precision(config.training.precision, ranks.device)
            device = machine_of(ranks, config.training)["device"]
            computing = f"computing in {precision} on {device}; ranks: {ranks.size}"
            say_rows("\n".join([*rows.data.report.lines(), computing]))
            sys.stdout.flush()
        if until == "train":
            check_target(config, rows, ranks)
        make_stages(RunContext(config, ranks, directory, stop, rows), chosen)
        summary = summarise(directory.path, ranks, rows.data.report, config, to=directory.path)
        last = summary["stages"].get(until, {})  # what was asked for, whatever came last
        directory.tell(stage=until, step=last.get("steps", 0), total_steps=last.get("total_steps", 0), doing="")
        return summary


def check_target(config: RunConfig, rows: RunRows, world: World) -> None:
    """Raise ConfigError for what would end the target's training at some step, after its reference was trained."""
    check_sharing(config, world)
    train = rows.data.train
    sizes = dict(zip(train.ids, train.n_targets.tolist(), strict=True))
    of_model = model_config(config.model.path).get_text_config()
    size = {
        "layers": getattr(of_model, "num_hidden_layers", sys.maxsize),
        "vocabulary": of_model.vocab_size,  # no tokens are added
    }
    # Before there are pairs, these are the least steps: groups of unequal size repeat examples.
    order = TrainingOrder(len(train), options=config.training, seed=0)
    if Wants(config).single_run and len(order.ends) < 2:
        raise ConfigError(
            f"--reference {config.reference} needs a second epoch, whose pairs are made from the "
            "losses of the first, but training ends before it: raise training.epochs (or training.max_steps)"
        )
    steps = order.total_steps
    world.on_main(lambda: config.objective.check(sizes, packed=train.packed, total_steps=steps, **size))


def make_stages(run: RunContext, stages: Sequence[StageSpec]) -> None:
    """Make the stages in their order, or read them back; each gets the values of those before it.

    Until there is a confidence, the table of scores has NaN for it.
    """
    values: Values = {"confidence": table_of(run.rows.data.train)}
    for stage in stages:
        values[stage.name] = stage.enter(run, values)
