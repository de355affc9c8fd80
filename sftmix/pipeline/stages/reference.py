"""The reference: the training dynamics of each training example."""

import numpy as np

from sftmix.components.component import Need, to_builtin
from sftmix.components.contracts import check_dynamics, check_given
from sftmix.config.wants import Wants
from sftmix.disk.tables import read_dynamics, write_dynamics
from sftmix.pipeline.context import Made, RunContext, StageSpec, Values
from sftmix.pipeline.inputs import (
    HASHES,
    Known,
    config_of_reference,
    deciding_callbacks,
    deciding_options,
    files_read,
    rows_and_model,
)
from sftmix.pipeline.validity import Inputs
from sftmix.types import TrainingDynamics
from sftmix.words.errors import DataError

FILE = "confidence/dynamics.parquet"
"""Beside what is made of it; reference/ has the checkpoints."""
FILES_KEPT = ("metrics.jsonl", "online", "scores*")
"""Beside the dynamics, what the stage keeps of the way to them, as patterns."""
OTHER_KEPT = (
    "the reference did not keep the same of each response as is asked for now (reference.keep, and what the components "
    "need)"
)
"""What a refusal says of it, in place of two lists."""
MAX_UNSCORED = 0.05
"""Largest share of examples that a reference may fail to score before the run stops with exit code 3."""


def inputs(known: Known) -> Inputs:
    """Return the inputs of the reference; one that is not trained adds only its files."""
    config, reference = known.config, known.config.reference
    own = config_of_reference(config)
    deciding, lora = deciding_callbacks(own.callbacks), own.model.lora
    trains = Need.TRAINING in reference.needs
    spec = reference.spec()
    for name in (*reference.changeable, *(["training"] if trains else [])):  # no result, or an entry of its own, below
        spec["init_args"].pop(name, None)
    kept = sorted({*(spec["init_args"].pop("keep", None) or ()), *known.wants.kept})
    found = {
        **rows_and_model(known),
        "reference": spec,
        # Contents of files of scores, and the code of classes of one's own.
        "reference_files": files_read(known, reference, *([config.optimizer, *deciding] if trains else [])),
    }
    if Need.SCORING in reference.needs and kept:
        found["kept"] = kept
    if trains:
        found |= {
            "optimizer": config.optimizer.spec(),
            "lora": to_builtin(lora) if lora.r else None,  # without adapters, their alpha and dropout say nothing
            "training": deciding_options(known, own.training),  # as inherited: null and the run's own value are one
            "callbacks": to_builtin(deciding),
            "seed": own.seed,
        }
    return found


def make(run: RunContext, values: Values) -> Made:
    from sftmix.pipeline.reference_run import ReferenceRun
    from sftmix.training.dynamics import describe_dynamics

    reference, ids = run.config.reference, run.rows.data.train.ids
    context = ReferenceRun(run)
    # FromFile may have other rows as well, and lack some.
    dynamics = check_dynamics(reference, reference.collect(context)).of(ids)
    missing = [ids[row] for row in np.flatnonzero(~dynamics.scored)]
    if len(missing) > MAX_UNSCORED * len(ids):
        raise DataError(
            f"the reference could not score {len(missing)} of {len(ids)} examples (first: {missing[:5]}): "
            "raise reference.model.max_length if no response token is left, lower its learning rate if their "
            "perplexities are not finite, or give a file that holds them"
        )
    if missing:
        run.say(f"confidence: {len(missing)} examples the reference could not score stay unpaired: {missing[:5]}")
    run.world.on_main(lambda: write_dynamics(run.path / FILE, dynamics))
    figures = {**context.figures, "checkpoints": dynamics.steps.tolist()}
    line = f"reference {reference}: {describe_dynamics(dynamics)}"
    kept = [file.name for name in FILES_KEPT for file in sorted((run.path / "reference").glob(name))]
    return Made([f"../{FILE}", *kept], figures, line)


def read(run: RunContext, values: Values) -> TrainingDynamics:
    """Return the dynamics, one row per training example; DataError if they lack what a component needs."""
    dynamics = read_dynamics(run.path / FILE).of(run.rows.data.train.ids)
    for component in Wants(run.config).readers:
        check_given(component, dynamics, str(run.config.reference))
    return dynamics


REFERENCE = StageSpec(
    name="reference",
    wanted=lambda wants: wants.dynamics,
    inputs=inputs,
    make=make,
    read=read,
    words=HASHES | {"kept": OTHER_KEPT},
    result=FILE,
    by_ranks=True,
    has_steps=True,
)
