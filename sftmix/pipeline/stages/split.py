"""The split of the training examples into groups; a single run's split is there for people to look at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sftmix.components.contracts import check_split, read_only
from sftmix.disk.tables import read_split, write_dynamics, write_split
from sftmix.pipeline.context import Made, RunContext, StageSpec, Values
from sftmix.pipeline.inputs import Known, hash_of, part_inputs, row_inputs
from sftmix.pipeline.stages.confidence import CONFIDENCE
from sftmix.pipeline.stages.selection import CHOSEN
from sftmix.pipeline.validity import Inputs
from sftmix.types import UNPAIRED, Split

FILE = "split/split.parquet"


def inputs(known: Known) -> Inputs:
    return {
        **row_inputs(known),
        "confidence": hash_of(known, "confidence/confidence.parquet", known.wants.by_confidence),
        **({"choice": hash_of(known, CHOSEN)} if known.wants.choice else {}),
        **part_inputs(known, "splitter"),
        "seed": known.config.seed,
    }


def make(run: RunContext, values: Values) -> Made:
    from sftmix.measure.confounds import describe_split

    scores, splitter = values["confidence"], run.config.splitter
    rows = values.get("choice", scores.row)
    table = scores.take(rows) if "choice" in values else scores
    found = check_split(splitter, splitter.split(read_only(table), seed=run.config.seed), table)
    group = np.full(len(scores), UNPAIRED, dtype=np.int8)
    group[rows] = found.group
    split = replace(found, group=group)
    write_split(run.path / FILE, scores.id, split)
    return Made(["split.parquet", "confounds.json"], describe_split(run.path, scores, split))  # which writes the second


def read(run: RunContext, values: Values) -> Split:
    return read_split(run.path / FILE, of=run.rows.data.train.ids)[1]


SPLIT = StageSpec(
    name="split",
    wanted=lambda wants: wants.split,
    inputs=inputs,
    make=make,
    read=read,
    result=FILE,
)


@dataclass(frozen=True, kw_only=True)
class LastSplit(StageSpec):
    """The same directory after the training of a single run: what divided its last epoch, with its confidence.

    before  the stages that would make them before a training
    """

    before: Sequence[StageSpec] = (CONFIDENCE, SPLIT)

    def among(self, stages: Sequence[StageSpec]) -> StageSpec:
        """Take confidence and split from these stages."""
        own = {stage.name: stage for stage in stages if stage is not self}
        return replace(self, before=[own.get(stage.name, stage) for stage in self.before])

    def enter(self, run: RunContext, values: Values) -> None:
        """Write the dynamics, then make confidence and split of them; later stages see neither."""
        from sftmix.pipeline.arm_order import dynamics_before, epochs_begun

        if (begun := epochs_begun(run)) == 1:
            run.say("train: stopped in the first epoch, before there was a split")
            return
        last = dynamics_before(run, begun - 1)  # the last epoch begun: epochs count from 0
        run.world.on_main(lambda: write_dynamics(run.path / "confidence/dynamics.parquet", last))
        own: Values = {"reference": last}
        confidence, split = self.before
        own["confidence"] = confidence.enter(run, own)
        split.enter(run, own)


LAST_SPLIT = LastSplit(**vars(SPLIT) | {"wanted": lambda wants: wants.single_run and wants.training})
