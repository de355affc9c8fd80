"""The stages of a run. Their order is the recipe. No module here imports torch before a stage is made."""

from collections.abc import Sequence

from sftmix.pipeline.context import StageSpec
from sftmix.pipeline.stages.arms import BASELINE, TRAIN
from sftmix.pipeline.stages.base import BASE
from sftmix.pipeline.stages.confidence import CONFIDENCE
from sftmix.pipeline.stages.reference import REFERENCE
from sftmix.pipeline.stages.selection import CHOICE, SELECTION
from sftmix.pipeline.stages.split import LAST_SPLIT, SPLIT

STAGES = (SELECTION, REFERENCE, CONFIDENCE, CHOICE, SPLIT, TRAIN, LAST_SPLIT, BASELINE, BASE)


def by_name(stages: Sequence[StageSpec] = STAGES) -> dict[str, StageSpec]:
    """Return name -> stage, in their order; the split, which a single run makes after its training, is there once."""
    return {stage.name: stage for stage in stages}


TRAINED = tuple(name for name, stage in by_name().items() if stage.has_steps)
"""The names of the stages with steps."""
