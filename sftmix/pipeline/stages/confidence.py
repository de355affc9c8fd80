"""The confidence: one number per example, made from the training dynamics."""

from dataclasses import replace

import numpy as np

from sftmix.components.confidence import variability
from sftmix.components.contracts import confidence_of
from sftmix.disk.tables import write_table
from sftmix.pipeline.context import Made, RunContext, StageSpec, Values
from sftmix.pipeline.inputs import Known, hash_of, part_inputs, row_inputs
from sftmix.pipeline.validity import Inputs
from sftmix.types import NOT_COUNTED, Scores, TrainingDynamics

FILE = "confidence/confidence.parquet"


def inputs(known: Known) -> Inputs:
    by_dynamics = known.wants.by_dynamics
    return {
        # Dynamics are of these rows already; a confidence with scores of its own reads none.
        **({} if by_dynamics else row_inputs(known)),
        "dynamics": hash_of(known, "confidence/dynamics.parquet", by_dynamics),
        **part_inputs(known, "confidence"),
    }


def make(run: RunContext, values: Values) -> Made:
    from sftmix.pipeline.rows import table_of

    given = _dynamics(run, values)
    confidence = confidence_of(run.config.confidence, given, table_of(run.rows.data.train).texts)
    write_table(run.path / FILE, given.ids, confidence=confidence, variability=variability(given))
    return Made(["confidence.parquet"])


def read(run: RunContext, values: Values) -> Scores:
    """Return the table that splitters and pair samplers see."""
    from sftmix.pipeline.rows import table_of

    return replace(table_of(run.rows.data.train, run.path / FILE), states=_dynamics(run, values).states)


def _dynamics(run: RunContext, values: Values) -> TrainingDynamics:
    """Return the reference's dynamics; without a reference, for a confidence with scores of its own, empty ones."""
    if dynamics := values.get("reference"):
        return dynamics
    train = run.rows.data.train
    nothing = np.full((len(train), 1), np.nan)  # [N, 1]: one checkpoint, at step 0, that knows no loss
    uncounted = np.full(nothing.shape, NOT_COUNTED)
    return TrainingDynamics(train.ids, np.zeros(1, np.int64), nothing, train.n_targets, uncounted)


CONFIDENCE = StageSpec(
    name="confidence",
    wanted=lambda wants: wants.confidence,
    inputs=inputs,
    make=make,
    read=read,
    result=FILE,
)
