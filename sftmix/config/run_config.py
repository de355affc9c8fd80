"""The typed tree of one run: what `config.yaml` holds and what the command line edits.

It also works without YAML, with the paper's defaults:

    RunConfig(out="runs/first", model=ModelOptions(path="..."), data=DataOptions(train=["rows.json"]))
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sftmix.components.base import (
    Callback,
    ConfidenceEstimator,
    Objective,
    Optimizer,
    Order,
    PairSampler,
    Perturbation,
    Reference,
    Selector,
    Splitter,
)
from sftmix.components.callbacks import Evaluate
from sftmix.components.component import Need, to_builtin
from sftmix.components.confidence import Perplexity
from sftmix.components.objectives import SFTMix
from sftmix.components.optimizers import AdamW
from sftmix.components.others.calibration import Calibration
from sftmix.components.others.remarks import Remarks
from sftmix.components.pairing import RandomPairs
from sftmix.components.reference import TrainedReference
from sftmix.components.renderer import Renderer
from sftmix.components.row_format import RowFormat
from sftmix.components.selection import All
from sftmix.components.splitters import Median
from sftmix.options.data import DataOptions
from sftmix.options.model import ModelOptions
from sftmix.options.training import CheckpointOptions, TrainingOptions
from sftmix.words.given import OptionFields


@dataclass(kw_only=True, eq=False)
class RunConfig(OptionFields):
    """Everything that decides what a run does. Two configurations are equal when their plain forms are."""

    out: str | None = None
    """Run directory; an existing one of the same configuration is resumed."""
    seed: int = 42
    """Decides order, pairs, lambdas and the held-out split."""
    with_baseline: bool = False
    """Also train the NTP arm from the same base model, in the same order and without perturbation, and report
    its held-out loss beside the target's."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """The model to fine-tune."""
    data: DataOptions = field(default_factory=DataOptions)
    """Training and held-out rows."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """Learning rate, batches, precision and ranks."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    """What a rerun resumes from."""
    row_format: RowFormat | None = None
    """A row -> its conversation, by your own class (my_rows.MyFormat); null: by data.format."""
    renderer: Renderer | None = None
    """A conversation -> its token ids, by your own class (my_turns.MyRenderer); null: by the chat template."""
    reference: Reference = field(default_factory=TrainedReference)
    """Where the training dynamics come from."""
    confidence: ConfidenceEstimator = field(default_factory=Perplexity)
    """Training dynamics -> one number per example."""
    splitter: Splitter = field(default_factory=Median)
    """Confidence -> groups of examples."""
    selector: Selector = field(default_factory=All)
    """Which examples are trained on at all, before anything else is done with them, or after they are scored."""
    pairing: PairSampler | Literal["auto"] | None = "auto"
    """Which examples are mixed. auto: RandomPairs when the objective mixes, else none; null: none."""
    order: Order | None = None
    """In which order an epoch without pairs goes through the examples, by your own class; null: shuffled."""
    objective: Objective = field(default_factory=SFTMix)
    """What each optimizer step minimises."""
    optimizer: Optimizer = field(default_factory=AdamW)
    """The update rule, in every training stage."""
    perturbation: Perturbation | None = None
    """What is done to the input embeddings in the target's training steps; null: nothing."""
    callbacks: list[Callback] = field(default_factory=lambda: [Calibration(), Remarks(), Evaluate()])
    """What is called in every training stage, the reference's too; `--callbacks+ CLASS` adds one. `--callbacks
    Evaluate` leaves out what takes time at the end, and null everything."""

    def __eq__(self, other: object) -> bool:
        return self.as_dict() == other.as_dict() if isinstance(other, RunConfig) else NotImplemented

    def resolved_pairing(self) -> PairSampler | None:
        """Return the chosen pair sampler, the default one for `auto`, or None."""
        if self.pairing == "auto":
            return RandomPairs() if Need.PAIRS in self.objective.needs else None
        return self.pairing

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as values of JSON; components as {"class_path", "init_args"}."""
        return {f.name: to_builtin(getattr(self, f.name)) for f in fields(self)}

    def yaml(self) -> str:
        """Return the plain form as YAML text, which `--config` reads."""
        import yaml

        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
