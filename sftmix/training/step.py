"""One optimizer step, from top to bottom: `train_step` is the whole step; the functions of its parts follow.

    1. the micro-batches of this rank            `micro_batches`, on the host
    2. a plan of each: weights, pairs, lambdas   `Objective.plan`, on the host; then both go to the device
    3. two counts over the whole global batch    `counts_of`, over ranks and micro-batches
    4. forward and backward of each micro-batch  `forward_backward`: `normalise`, `TrainingModule.forward`
    5. clip, and update                          `sftmix.training.update`, at `learning_rate`

Each loss is divided by a count:

    NTP    all trained tokens of the global batch
    Mixup  all mixed token pairs of the global batch; under mixup_mean "ntp" the NTP count

The global batch is the examples of all ranks in all micro-batches of the step. A mean of the micro-batches' means would
weigh a token of a small micro-batch more than one of a large one, so both counts are summed before the first backward.
Every loss is also multiplied by the world size, because DDP and FSDP average gradients over ranks, but a sum is wanted.

No random state is carried from step to step: order, pairs and lambdas are functions of (seed, step), dropout is one of
seed, step and the layout in ranks and micro-batches. Resume, log, checkpoints, callbacks and online losses belong to
`sftmix.training.loop`, which calls `train_step` and reads its `StepResult`.

The host launches all passes of a step on the device before it waits for a result. While the device computes, the host
prepares the next step; then it reads the sums and the gradient norm in one transfer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from sftmix.batches.collate import collate, to_device
from sftmix.batches.deal import deal
from sftmix.batches.order import TokenisedRows, TrainingOrder, Unit
from sftmix.components.base import Callback, Objective, Optimizer, Perturbation
from sftmix.components.component import Need
from sftmix.components.contracts import check_embeddings, check_loss, check_plan
from sftmix.components.optimizers import AdamW
from sftmix.functional import SFTLoss
from sftmix.functional.fused import unpaired_rows
from sftmix.options.training import CheckpointOptions, TrainingOptions
from sftmix.ranks.rng import stable_hash
from sftmix.ranks.world import World
from sftmix.training.callback_state import refusing_moves
from sftmix.training.module import Perturb
from sftmix.training.parallel import autocast, gradient_sync, unwrap
from sftmix.training.scoring import Scorer, with_batch_nll
from sftmix.training.update import (
    clip_and_update,
    clip_gradients,
    decides_on_device,
    gradient_norm,
    gradient_shards,
    learning_rate,
    refuse_unequal,
    trace_of,
)
from sftmix.types import Batch, Plan, Split
from sftmix.words.errors import ConfigError

if TYPE_CHECKING:
    from sftmix.training.dynamics import OnlineLosses


@dataclass
class Stage:
    """One training stage: its model, data, order and objective."""

    name: str
    model: PreTrainedModel
    data: TokenisedRows
    order: TrainingOrder
    objective: Objective
    options: TrainingOptions
    checkpoint: CheckpointOptions
    directory: Path
    seed: int
    scorer: Scorer
    identity: str = ""
    """Hash of everything the stage is made from; a checkpoint of another identity is refused."""
    pad_id: int = 0
    split_of: Callable[[int], Split | None] = lambda epoch: None
    """The groups in each epoch."""
    optimizer: Optimizer = field(default_factory=AdamW)
    perturbation: Perturbation | None = None
    online: "OnlineLosses | None" = None
    """The store for the losses of the current epoch."""
    eval_data: TokenisedRows | None = None
    attention: str | None = None
    """The attention that the user has named (model.attention); None: on CUDA a model with sdpa may get varlen."""
    packed: bool = False
    """True if some rows hold several documents, which must not attend to each other."""
    callbacks: Sequence[Callback] = ()
    on_progress: Callable[[int, int], None] = lambda step, total: None


@dataclass
class StepSetup:
    """The setup that all steps of a stage share. `module` wraps the model, `teacher` is a `Teacher` or None."""

    stage: Stage
    module: nn.Module
    optimizer: torch.optim.Optimizer
    precision: str
    world: World
    teacher: Any = None


class PreparedStep(NamedTuple):
    """The host's part of a step: this rank's micro-batches, on the host, with their plans.

    number   of the step, from 0
    plans    None if they need the NLL of the global batch under the weights of this step
    problem  None, or what is wrong with a plan
    """

    number: int
    batches: list[Batch]
    plans: list[Plan] | None
    problem: str | None


class Counts(NamedTuple):
    """What the losses of a step are divided by: sums over the whole global batch.

    ntp, mixup      the two denominators (weights: an objective may count sequences)
    mu, mixup_mean  those of the plans that mix
    """

    ntp: float
    mixup: float
    mu: float
    mixup_mean: str

    @property
    def any(self) -> bool:
        """True if something counts. If nothing does every gradient is 0, but AdamW would still move the weights."""
        return self.ntp > 0 or (self.mixup > 0 and self.mixup_mean == "own")


@dataclass
class StepResult:
    """The outcome of one step. All fields but the last three are of the whole global batch, equal on every rank.

    loss           the minimised loss: both terms, weighted and divided
    ntp            mean NLL of the response tokens that carried NTP loss, whatever their weights; 0 without any
    ntp_loss, mixup    each term by itself, over its count and without mu; 0 if there is none
    ntp_tokens, mixup_tokens  tokens that carried NTP loss, and token pairs that were mixed
    grad_norm      before clipping; if it or the loss is not finite, the step is skipped
    batches, plans this rank's micro-batches, and the plan of each, unnormalised, on the device
    nll            the NLL of the token rows [T] of each micro-batch, detached
    """

    loss: float
    ntp: float
    ntp_loss: float
    mixup: float
    ntp_tokens: int
    mixup_tokens: int
    grad_norm: float
    counts: Counts
    learning_rate: float
    batches: list[Batch]
    plans: list[Plan]
    nll: list[torch.Tensor]

    @property
    def skipped(self) -> bool:
        return not (math.isfinite(self.grad_norm) and math.isfinite(self.loss))

    @property
    def updates(self) -> bool:
        """True if the weights change."""
        return not self.skipped and self.counts.any


def prepare_step(setup: StepSetup, step: int, units: Sequence[Unit], split: Split | None) -> PreparedStep:
    """Prepare this rank's part of step `step` (from 0); `units` are the whole global batch, those of all ranks."""
    # 1. micro-batches
    stage = setup.stage
    needs, parts = stage.objective.needs, (stage.data, stage.options, setup.world, setup.module)
    prompts = Need.PROMPTS in needs
    batches = micro_batches(units, *parts, split=split, pad_id=stage.pad_id, prompts=prompts)
    if Need.BATCH_NLL in needs:
        return PreparedStep(step, batches, None, None)
    # 2. plans
    return PreparedStep(step, batches, *plans_of(setup, batches, step))


def train_step(setup: StepSetup, prepared: PreparedStep, meanwhile: Callable[[], object] | None = None) -> StepResult:
    """Train on one global batch. All ranks call it together.

    meanwhile  work of the host that is done while the device computes
    """
    stage, world, step = setup.stage, setup.world, prepared.number
    setup.module.train()
    rate = learning_rate(step, stage.order.total_steps, stage.options)
    for group in setup.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(stable_hash(stage.seed, "dropout", step, world.rank) % 2**63)

    # 2. plans, if they need the weights of this step
    if prepared.plans is None:
        batches = with_batch_nll(prepared.batches, stage.data.ids, setup.module, world, setup.precision)
        prepared = PreparedStep(step, batches, *plans_of(setup, batches, step))
    # 3. counts over all ranks
    counts = counts_of(prepared, world)
    batches = [to_device(batch, world.device) for batch in prepared.batches]
    plans = [to_device(plan, world.device) for plan in prepared.plans or ()]

    # 4. forward and backward
    sums, nll = forward_backward(setup, step, batches, plans, counts)

    # 5. clip and update
    shards, limit = gradient_shards(setup.module), stage.options.max_grad_norm
    norm = gradient_norm(setup.module, shards)
    on_device = counts.any and decides_on_device(setup.optimizer)
    if on_device:
        clip_and_update(setup.optimizer, norm, sums[0], limit, world)
    else:
        clip_gradients(shards, norm, limit)
    if meanwhile is not None:
        meanwhile()
    figures = read_sums(sums, norm, counts, world, trace_of(setup.module))
    result = StepResult(**figures, counts=counts, learning_rate=rate, batches=batches, plans=plans, nll=nll)
    if result.updates:  # decided by sums over all ranks, so alike on every rank
        if not on_device:
            setup.optimizer.step()
        if setup.teacher:
            setup.teacher.update()
    setup.optimizer.zero_grad(set_to_none=True)
    return result


# --------------------------------------------------------------------------------------- 1. micro-batches


def micro_batches(
    units: Sequence[Unit],
    data: TokenisedRows,
    options: TrainingOptions,
    world: World,
    module: nn.Module,
    *,
    split: Split | None,
    pad_id: int,
    prompts: bool = False,
) -> list[Batch]:
    """Return this rank's share of a global batch, on the host, in the layout of the (wrapped) module."""
    one_row = unwrap(module).padding_free
    how: dict[str, Any] = {"padding_free": one_row, "split": split, "pad_id": pad_id, "prompts": prompts}
    batches = []
    for micro_step in deal(units, data.lengths, options, ranks=world.size, device=world.device, padding_free=one_row):
        units_of_rank, n_segments = micro_step.ranks[world.rank], micro_step.n_segments
        if not isinstance(module, FSDPModule):  # only FSDP needs as many on each rank: it gathers per segment
            n_segments = min(n_segments, sum(map(len, units_of_rank)))
        batches.append(collate(units_of_rank, data, n_segments=n_segments, **how))
    return batches


# -------------------------------------------------------------------------------------------- 2. plans


def plans_of(setup: StepSetup, batches: Sequence[Batch], step: int) -> tuple[list[Plan], str | None]:
    """Return the plans of this rank's micro-batches and None; if one is wrong, no plans and the message."""
    stage, plans = setup.stage, list[Plan]()
    try:
        with refusing_moves(stage.objective):
            for batch in batches:
                plan = stage.objective.plan(batch, step=step, total_steps=stage.order.total_steps, seed=stage.seed)
                plan = check_plan(stage.objective, plan, batch)
                plans.append(replace(plan, unpaired=unpaired_rows(plan.pairs, len(batch.labels))))
    except ConfigError as error:
        return [], str(error)
    return plans, None


# ------------------------------------------------------------------------------ 3. counts over all ranks


def counts_of(prepared: PreparedStep, world: World) -> Counts:
    """Add up what the plans of all ranks count. Raises ConfigError on every rank if a plan of any is wrong."""
    plans, problem = prepared.plans or [], prepared.problem
    by_ntp = sum(p.mixup_count for p in plans if p.mixup_mean == "ntp")  # above 0: so says the log
    counts = [sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans), by_ntp, problem is not None]
    mu_of_ranks = [0.0] * world.size  # each rank fills its place; a plan without pairs has mu 0
    mu_of_ranks[world.rank] = max((p.mu for p in plans), default=0.0)
    ntp, mixup, by_ntp, broken, *mu_of_ranks = world.sum([*counts, *mu_of_ranks])
    if broken:  # every rank raises the message, so that none waits for another
        raise ConfigError(next(filter(None, world.gather(problem))))
    return Counts(ntp, mixup, max(mu_of_ranks), "ntp" if by_ntp else "own")


# --------------------------------------------------------------------------------- 4. forward and backward


def forward_backward(
    setup: StepSetup, step: int, batches: Sequence[Batch], plans: Sequence[Plan], counts: Counts
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Give the weights their gradients; return the sums of `step_sums` and the NLL [T] of each micro-batch."""
    stage, module, world = setup.stage, setup.module, setup.world
    teacher = setup.teacher
    taught = teacher.taught(batches, world, setup.precision) if teacher else [None] * len(batches)
    how: dict[str, Any] = {"perturb": perturbing(stage, step), "loss": stage.objective.loss}
    sums = torch.zeros(6, dtype=torch.float64, device=world.device)
    nll = []
    for number, (batch, plan, of_batch) in enumerate(zip(batches, plans, taught, strict=True), start=1):
        scaled = normalise(plan, ntp_count=counts.ntp, mixup_count=counts.mixup, world_size=world.size)
        reduced = number == len(batches) or stage.options.reduce_each_micro_batch is True
        with gradient_sync(module, enabled=reduced):
            with autocast(module, setup.precision, world.device):
                out = module(batch, scaled, **how, teacher=of_batch)
            check_loss(stage.objective, out, plan)
            out.loss.backward()
        if reduced:
            refuse_unreached(module, stage.objective)
        sums += step_sums(plan, out)
        nll.append(out.nll)
        del out  # frees its graph before the next forward
    return sums, nll


def perturbing(stage: Stage, step: int) -> Perturb | None:
    """Return the change of the input embeddings in a step; None if the stage has none."""
    perturbation = stage.perturbation
    if perturbation is None:
        return None

    def perturb(e: torch.Tensor, mask: torch.Tensor, *, ids: Sequence[str]) -> torch.Tensor:
        """e  [b, l, D] of a segment with its mask i64[b, l] and b ids"""
        changed = perturbation.embeddings(e, mask, ids=ids, step=step, seed=stage.seed)
        return check_embeddings(perturbation, e, changed)

    return perturb


def normalise(plan: Plan, *, ntp_count: float, mixup_count: float, world_size: int) -> Plan:
    """Divide the plan's weights by the counts of the whole global batch, times the world size (see above)."""
    pair_count = ntp_count if plan.mixup_mean == "ntp" else mixup_count
    row_factor = world_size / ntp_count if ntp_count else 0.0
    pair_factor = world_size / pair_count if pair_count else 0.0
    of_prompts = plan.prompt_weight
    return replace(
        plan,
        row_weight=plan.row_weight.double() * row_factor,
        pair_weight=plan.pair_weight * pair_factor,
        prompt_weight=None if of_prompts is None else of_prompts.double() * row_factor,
    )


def step_sums(plan: Plan, out: SFTLoss) -> torch.Tensor:
    """Return f64[6] on the device: loss, NLL of trained tokens, weighted NLL, Mixup loss (without mu), both counts."""
    weight, aligned = plan.row_weight, out.mixup.new_full((), len(plan.pairs))
    mixed = (plan.pair_weight * out.mixup).sum() / (plan.mu or 1.0)
    trained, weighted = (weight != 0).to(weight.dtype), (weight * out.nll).sum()
    if plan.prompt_weight is not None and out.prompt is not None:
        weighted = weighted + (plan.prompt_weight * out.prompt).sum()
    nll_sum, tokens = (trained * out.nll).sum(), torch.count_nonzero(weight)
    return torch.stack([x.detach().double() for x in (out.loss, nll_sum, weighted, mixed, tokens, aligned)])


def refuse_unreached(module: nn.Module, objective: Objective) -> None:
    """Raise ConfigError if DDP waits for the gradient of a parameter that this loss does not reach."""
    if getattr(module, "find_unused_parameters", True):  # no DDP, or one that looks for them
        return
    for name, p in unwrap(module).model.named_parameters():
        if p.requires_grad and p.grad is None:
            raise ConfigError(
                f"objective {objective}: its loss gives no gradient to {name}, for which training.parallel ddp waits, "
                "as the model's own loss gives one: use --training.parallel fsdp, or one process"
            )


# -------------------------------------------------------------------------------------- 5. clip and update


def read_sums(sums: torch.Tensor, norm: torch.Tensor, counts: Counts, world: World, trace: int) -> dict[str, Any]:
    """Wait for the device; return those fields of a StepResult that it has computed, over all ranks."""
    *sums_of_rank, grad_norm = torch.cat([sums, norm.double()[None]]).tolist()
    loss, nll_sum, weighted, mixed, tokens, aligned, *traces = world.sum([*sums_of_rank, 1, trace, trace**2])
    refuse_unequal(trace, *traces)
    return {
        "loss": loss / world.size,  # each rank's loss was multiplied by it
        "ntp": nll_sum / tokens if tokens else 0.0,
        "ntp_loss": weighted / counts.ntp if counts.ntp else 0.0,
        "mixup": mixed / counts.mixup if counts.mixup else 0.0,
        "ntp_tokens": int(tokens),
        "mixup_tokens": int(aligned),
        "grad_norm": grad_norm,
    }
