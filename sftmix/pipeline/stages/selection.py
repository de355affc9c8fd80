"""The selection: which training rows the selector keeps, before anything is scored or, as the choice, after it."""

import numpy as np

from sftmix.components.contracts import check_selection, read_only
from sftmix.disk.tables import read_columns, write_table
from sftmix.pipeline.context import Made, RunContext, StageSpec, Values
from sftmix.pipeline.inputs import Known, hash_of, part_inputs, row_inputs
from sftmix.pipeline.validity import Inputs
from sftmix.types import Rows


def inputs(known: Known) -> Inputs:
    return {
        "data": known.rows.whole.fingerprint,  # all rows: the selected ones are the result
        **part_inputs(known, "selector"),
        "seed": known.config.seed,
    }


def make(run: RunContext, values: Values) -> Made:
    """Write the ids that the selector keeps, in file order; `read_rows` has asked it already."""
    write_table(run.path / "selection/selected.parquet", run.rows.data.train.ids)
    return Made(["selected.parquet"])


SELECTION = StageSpec(
    name="selection",
    wanted=lambda wants: wants.selection,
    inputs=inputs,
    make=make,
)

CHOSEN = "choice/selected.parquet"


def inputs_of_choice(known: Known) -> Inputs:
    return {
        **row_inputs(known),
        "confidence": hash_of(known, "confidence/confidence.parquet"),
        **part_inputs(known, "selector"),
        "seed": known.config.seed,
    }


def choose(run: RunContext, values: Values) -> Made:
    """Write the ids that the selector keeps of the scored rows, in file order."""
    selector, scores = run.config.selector, values["confidence"]
    rows = check_selection(selector, selector.select(read_only(scores), seed=run.config.seed), len(scores))
    write_table(run.path / CHOSEN, [scores.id[row] for row in rows])
    return Made(["selected.parquet"], {}, f"choice: {len(rows):,} of {len(scores):,} examples chosen by {selector}")


def read_choice(run: RunContext, values: Values) -> Rows:
    """Return i64[K], the rows that are trained on, in file order."""
    return np.flatnonzero(np.isin(run.rows.data.train.ids, read_columns(run.path / CHOSEN, "id")["id"]))


CHOICE = StageSpec(
    name="choice",
    wanted=lambda wants: wants.choice,
    inputs=inputs_of_choice,
    make=choose,
    read=read_choice,
)
