"""The base classes of everything a user may swap.

A component is a plain class whose keyword-only, typed `__init__` is its whole schema. Model, tokenizer, seed and step
arrive as method arguments, never through the constructor, so a component can be pickled and tested alone. Every random
choice is drawn from `sftmix.ranks.rng.generator(seed, purpose, ...)`. The command line imports component modules, and
must start fast: they import torch inside methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sftmix.components.component import KEPT, Component, Need
from sftmix.components.view import LossView, SFTLoss
from sftmix.options.reference import ReferenceModel, ReferenceTraining
from sftmix.options.training import TrainingOptions
from sftmix.types import (
    Batch,
    Encoded,
    Float64,
    Plan,
    RowLosses,
    Rows,
    RowScorer,
    Scores,
    Split,
    Tensor,
    TorchOptimizer,
    TrainingDynamics,
)
from sftmix.words.errors import ConfigError, nearest, with_suggestion


class ReferenceContext(Protocol):
    """The services that the pipeline lends to a Reference: the examples' ids, and training and scoring.

    What is kept of each response is what the reference says by `token_nll`, `response_alone` and `keep`.
    """

    ids: list[str]
    """The N example ids, in row order."""

    def content_hashes(self) -> Sequence[str]:
        """Return the hash of each example's turns, in row order; examples of the same text have the same."""

    def train_and_score(self, checkpoints: int | Sequence[float] | Literal["online"]) -> TrainingDynamics:
        """Train the reference's `model` by NTP, with its `training`, and score every example at `checkpoints`, as
        TrainedReference takes them."""

    def score_models(self, paths: Sequence[str], *, model: ReferenceModel) -> TrainingDynamics:
        """Score every example by each of the models, untrained (see FromCheckpoints). `model` has template and length
        of the rows, for the first model's tokenizer."""

    def score_rows(
        self, scorers: Mapping[str, Callable[[Any], RowScorer]], *, model: ReferenceModel, threads: int = 1
    ) -> TrainingDynamics:
        """Score every example by functions of a row, which so many threads of the first rank call.

        scorers  name of a checkpoint -> function: the tokenizer, which it may refuse -> the function of a row
        model    whose tokenizer, template and length the rows have, as for FromCheckpoints
        """


class Reference(Component, ABC):
    """A source of training dynamics.

    Its dynamics come from a training run of its own (TRAINING), from models that only score (SCORING), from a file or
    a server (no needs), or from the target's own losses of one epoch, which split the data for the next
    (TARGET_LOSSES).
    """

    option = "reference"
    needs = frozenset({Need.TRAINING, Need.SCORING})
    """Without TRAINING, seed and training options do not matter; without SCORING, `collect` needs no ranks."""
    gives = frozenset({Need.RESPONSE_ALONE, Need.CORRECT, Need.BEFORE_TRAINING, *KEPT})
    """What the dynamics may hold; a confidence that needs something else is refused before any work."""
    model: ReferenceModel | None = None
    """The model that is trained or scores; None: the target's base model."""
    training: ReferenceTraining | None = None
    """Differences from the run's training options; None inherits them all."""
    token_nll = False
    """True if the dynamics hold TOKEN_NLL; a reference without this option that may have it says so in `gives`."""
    response_alone = False
    """True if each response is also scored without its instruction."""
    keep: Sequence[str] | None = None
    """What else is kept of each response, in the words of KEPT, beside what components need."""
    changeable: Set[str] = frozenset()
    """Options that may change after the stage has begun: they do not decide the dynamics."""
    window: int | None = 1
    """Past epochs that count as checkpoints, if the losses are the target's own; None: all."""

    def most_checkpoints(self, epochs: float | None) -> int | None:
        """Return the most checkpoints of a run of so many epochs (None: of a number of steps), None if not known."""
        return None

    @abstractmethod
    def collect(self, context: ReferenceContext) -> TrainingDynamics:
        """Return the dynamics of exactly `context.ids`, in that order (n_tokens 0 = could not be scored)."""


class ConfidenceEstimator(Component, ABC):
    """Training dynamics -> one number per example. It may need CORRECT, BEFORE_TRAINING and members of OF_DYNAMICS.

    One that gives CONFIDENCE has scores of its own: no reference is trained, and it gets dynamics of the ids alone.
    """

    option = "confidence"
    least_checkpoints = 1
    """The smallest number of checkpoints that the estimator works with."""

    @abstractmethod
    def estimate(self, dynamics: TrainingDynamics) -> Float64:
        """Return f64[N], higher = more confident; NaN exactly where `dynamics.scored` is False."""


class Splitter(Component, ABC):
    """Scores -> groups, most confident first. It may need CONFIDENCE, MEAN_STATES or TEXTS."""

    option = "splitter"
    needs = frozenset({Need.CONFIDENCE})
    """Empty if the split comes from labels or a file: then no reference is trained."""

    @abstractmethod
    def split(self, scores: Scores, *, seed: int) -> Split:
        """Return the group of every row. Rows without a confidence (NaN) must become unpaired (-1)."""


class PairSampler(Component, ABC):
    """The choice of the examples that are mixed with each other in one epoch; needs as for Splitter."""

    option = "pairing"

    @abstractmethod
    def pairs(self, split: Split, scores: Scores, *, epoch: int, seed: int) -> Rows:
        """Return i64[P, 2] rows, column 0 the more confident, in the order in which they are trained on. A row may be
        in several pairs (its later appearances carry no NTP loss), never with itself; unpaired rows are in none."""


class Order(Component, ABC):
    """The order of the examples in an epoch without pairs; it may need CONFIDENCE, MEAN_STATES or TEXTS."""

    option = "order"

    @abstractmethod
    def rows(self, scores: Scores, *, epoch: int, seed: int) -> Rows:
        """Return i64[N], each row once, in the order in which they are trained on."""


class Selector(Component, ABC):
    """The choice of the examples to train on, before anything is scored; with CONFIDENCE or MEAN_STATES after it."""

    option = "selector"

    @abstractmethod
    def select(self, scores: Scores, *, seed: int) -> Rows:
        """Return i64[K], the distinct rows to keep, in any order. `scores` has lengths, labels and user columns."""


class Schedule(Component, ABC):
    """A number that changes during training: mu and alpha of an objective may be one."""

    @abstractmethod
    def value(self, step: int, total_steps: int) -> float:
        """Return the value at optimizer step `step`, 0..total_steps - 1; a pure function of both."""


class Perturbation(Component, ABC):
    """A change of the input embeddings in training steps; scoring and evaluation never see it."""

    option = "perturbation"

    @abstractmethod
    def embeddings(self, e: Tensor, mask: Tensor, *, ids: Sequence[str], step: int, seed: int) -> Tensor:
        """Return the embeddings [B, L, D] to train on, differentiable in `e`.

        e     [B, L, D], the embedding module's output for B examples padded to L tokens
        mask  i64[B, L], 1 for real tokens
        ids   B example ids; random numbers are drawn from (seed, step, id), for each example by itself
        """


class Objective(Component, ABC):
    """The loss of an optimizer step: a plan of weights and counts, and the loss of a micro-batch under it.

    It may need PAIRS: `--pairing auto` then is RandomPairs. FIRST_SPLIT: refused in a single run. STATES: `view.states`
    with a layer. BATCH_NLL: `batch.batch_nll`, by one more pass. PROMPTS: `batch.prompt`. TEACHER: `view.teacher`.
    """

    option = "objective"
    gives = frozenset({Need.MIXED_HEAD_INPUTS})
    teacher_decay: float | None = None
    """With TEACHER: d of t = d t + (1 - d) w after each update; None: the teacher has the weights before training."""
    passes: float = 1
    """Passes over the batch in a step, forward and backward; 2 if the loss calls `view.states`. For `estimate`."""

    def check(self, sizes: Mapping[str, int], *, packed: bool, layers: int, vocabulary: int, total_steps: int) -> None:
        """Raise ConfigError for what a step could not use, before anything is trained; called by rank 0.

        sizes   the training examples and how many response tokens each has
        packed  some example holds several documents
        layers  of the decoder
        vocabulary   token ids of the model
        total_steps  of the training, at least: pairs that repeat examples make more
        """

    def begin(self, examples: Iterable[Encoded]) -> None:
        """Read what the loss needs of the stage's examples; called on every rank before the first step, and again
        after a resume. What is kept must follow from the examples alone: all ranks have the same ones.

        examples  read from the disk one by one
        """

    @abstractmethod
    def plan(self, batch: Batch, *, step: int, total_steps: int, seed: int) -> Plan:
        """Return weights, lambdas and counts for one micro-batch, unnormalised (see `sftmix.types.Plan`), at a `step`
        from 0. Batch and plan are on the host, where reading values costs nothing; `loss` gets both on the device."""

    def loss(self, view: LossView, batch: Batch, plan: Plan) -> SFTLoss:
        """Return the loss of one micro-batch, by default `sftmix.functional.sft_loss`, inside the wrapped forward. The
        plan's weights are divided by the counts of the global batch, so the terms are sums of weighted losses; `nll`
        [T] and `mixup` [M] are returned detached, for the log."""
        return view.sft_loss(batch, plan)


class Optimizer(Component, ABC):
    """The update rule of a step, in every training stage; with WHOLE_WEIGHTS it is refused under fsdp and hsdp."""

    state_bytes: float = 8
    """Bytes of state per trained number, by which memory and room on the disk are counted; 8: two float32 moments."""

    @abstractmethod
    def build(self, parameters: Mapping[str, Tensor], *, training: TrainingOptions) -> TorchOptimizer:
        """Return an optimizer of exactly these parameters, its state tensors and numbers; it sets no learning rate.

        parameters  the trained parameters by their names in the model, float32; DTensors if ranks share the weights
        training    learning_rate is the peak: before each step the loop sets `lr` of every group
        """


@dataclass(frozen=True)
class StageState:
    """The state of a stage, for callbacks to read.

    stage        "reference", "train" or "baseline"
    step         optimizer steps done, of total_steps in this stage
    epoch        epochs completed; the last of a run counts even if it is cut short
    metrics      the metrics of the last step, as in metrics.jsonl, with those of the callbacks before this one
    score        function: NLL, token count and correct count of every training row, or of the given `rows`, under the
                 current model; with `alone=True`, of the responses without their instructions
    evaluate     function: the metrics of the held-out rows; None without held-out rows
    read         function: call `f(hidden[T, D], head, batch, plan)` for each micro-batch of the last step, hidden being
                 the input of the LM head, and return the results of all ranks; None before the first step
    objective    of the stage
    evaluations  (step, held-out NLL) of every evaluation of this stage so far, including those before a resume
    directory    of the stage, in the run directory; None outside a run
    measure      function, in `on_delivered` alone: call `f(hidden[T, D], head, batch)` for batches of held-out rows. f
                 returns two lists of tensors [T, ...], to keep and to add up for each row. The result has N entries
                 for each tensor, in row order: arrays [n_tokens, ...], or sums f64[...]. None without such rows
    held_out     ids of the N held-out rows
    is_main      True on the one rank that writes files
    All functions make forward passes in eval mode; every rank must call them together.
    """

    stage: str
    step: int
    total_steps: int
    epoch: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    score: Callable[..., RowLosses] | None = None
    evaluate: Callable[[], Mapping[str, float]] | None = None
    read: Callable[[Callable[..., Any]], list[Any]] | None = None
    objective: Objective | None = None
    evaluations: Sequence[tuple[int, float]] = ()
    directory: Path | None = None
    is_main: bool = True
    measure: Callable[[Callable[..., Any]], list[list[Any]]] | None = None
    held_out: Sequence[str] = ()


@dataclass(frozen=True)
class CallbackResult:
    """Metrics for the log, or for figures.json at the end of a stage. `stop` on any rank ends all after this step."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    stop: bool = False


@dataclass(frozen=True)
class Delivered:
    """What a callback found of the delivered weights.

    figures  values of JSON for the stage's figures.json
    files    name -> value of JSON, each a file in the directory of the stage
    scores   of the held-out rows, if the callback has measured them: the stage then makes no pass of its own
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    scores: RowLosses | None = None


class Callback(Component):
    """Hooks that are called on every rank. Those of the loop, in every training stage, may return a CallbackResult.

    It may need HELD_OUT: without held-out rows a run is refused, and a reference is trained without the callback. Or it
    may need EVALUATIONS, of a callback in front of it.
    """

    option = "callbacks"
    gives = frozenset({Need.EVALUATIONS, Need.STOP})
    """Without STOP it never stops training, so that a run is the same with and without it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise ConfigError for a method named like a hook that is none: nothing would call it."""
        super().__init_subclass__(**options)
        hooks = [name for name in vars(Callback) if name.startswith("on_")]
        if unknown := [name for name in vars(cls) if name.startswith("on_") and name not in hooks]:
            problem = f"callbacks: {cls.__name__} has {unknown[0]}(), which nothing calls"
            raise ConfigError(with_suggestion(problem, nearest(unknown[0], hooks), f"hooks: {', '.join(hooks)}"))

    def on_stage_start(self, state: StageState) -> CallbackResult | None:
        """Run before the first step, and again after a resume: metrics are then dropped, as the log has them."""

    def on_step_end(self, state: StageState) -> CallbackResult | None:
        """Run after every optimizer step."""

    def on_epoch_end(self, state: StageState) -> CallbackResult | None:
        """Run after the last step of every epoch."""

    def on_stage_end(self, state: StageState) -> CallbackResult | None:
        """Run after the last step."""

    def on_delivered(self, state: StageState) -> Delivered | None:
        """Run on the weights that `train` or `baseline` delivers, rounded as in its model; the reference has none."""

    def on_summary(self, stages: Mapping[str, Mapping[str, Any]]) -> list[str] | None:
        """Return sentences for `remarks` of summary.json, from stage -> its figures, at the end of a command."""
