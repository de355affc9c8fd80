"""The public names of this package for type checkers, which cannot see names that are imported on first use."""

from sftmix.config import RunConfig as RunConfig
from sftmix.functional import SFTLoss as SFTLoss
from sftmix.functional import reference_sft_loss as reference_sft_loss
from sftmix.functional import sft_loss as sft_loss
from sftmix.pipeline.recipe import run as run
from sftmix.types import Batch as Batch
from sftmix.types import Example as Example
from sftmix.types import Plan as Plan
from sftmix.types import Scores as Scores
from sftmix.types import Split as Split
from sftmix.types import TrainingDynamics as TrainingDynamics

__version__: str
