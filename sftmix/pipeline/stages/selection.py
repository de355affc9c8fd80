"""The selection: which training rows the selector keeps."""

from sftmix.components.selection import All
from sftmix.disk.tables import write_table
from sftmix.pipeline.context import Made, RunContext, StageSpec, Values
from sftmix.pipeline.inputs import Known, files_read
from sftmix.pipeline.validity import Inputs


def inputs(known: Known) -> Inputs:
    return {
        "data": known.rows.whole.fingerprint,  # all rows: the selected ones are the result
        "selector": known.config.selector.spec(),
        "seed": known.config.seed,
        "selector_files": files_read(known, known.config.selector),
    }


def make(run: RunContext, values: Values) -> Made:
    """Write the ids that the selector keeps, in file order; `read_rows` has asked it already."""
    write_table(run.path / "selection/selected.parquet", run.rows.data.train.ids)
    return Made(["selected.parquet"])


SELECTION = StageSpec(
    name="selection",
    entered=lambda wants: not isinstance(wants.config.selector, All),
    inputs=inputs,
    make=make,
)
