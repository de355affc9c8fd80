"""The memory of a training step, as a function of the token slots of a micro-batch: one model for `run` and `estimate`.

Weights, gradients, optimizer and head are arithmetic on numbers of parameters. What a forward keeps for its backward is
read from forwards of the shipped module: a run makes them on its device, `estimate` on fake tensors, which have shapes
and no storage.
"""

import bisect
import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from sftmix.batches.collate import collate, to_device
from sftmix.batches.order import Slot, TokenisedRows, TrainingOrder
from sftmix.components.base import Objective, Optimizer
from sftmix.components.component import Need
from sftmix.components.plans import ntp_plan
from sftmix.components.view import Taught
from sftmix.functional.fused import block_rows, default_chunk_size, unpaired_rows
from sftmix.options.training import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.callback_state import unmoved
from sftmix.training.module import TrainingModule
from sftmix.training.numbers import Numbers, layers_of, teacher_bytes
from sftmix.training.parallel import reshard, shards_of, unwrap
from sftmix.training.scoring import eval_mode
from sftmix.training.step import StepSetup

MEASURED = 128
"""Most tokens of each of the rows that a run measures on a CPU; what is kept grows with the tokens."""


class Workload(NamedTuple):
    """What is computed in a step, as far as its memory depends on it.

    module     wraps the model; its parameters may be fake
    order      of which the first batch says how many rows a unit, and a step, has
    optimizer  the component, which says what its state needs
    precision  fp32 or bf16
    world      whose other ranks need not be there
    """

    module: nn.Module
    data: TokenisedRows
    order: TrainingOrder
    objective: Objective
    optimizer: Optimizer
    options: TrainingOptions
    precision: str
    world: World


def workload_of(setup: StepSetup) -> Workload:
    """Return what a stage computes in a step."""
    stage = setup.stage
    parts = (stage.data, stage.order, stage.objective, stage.optimizer, stage.options)
    return Workload(setup.module, *parts, setup.precision, setup.world)


def kept_by_forward(work: Workload, length: int, within: AbstractContextManager[Any]) -> int:
    """Return the bytes that a forward of a unit of rows (a pair: two) keeps for its backward, weights left out.

    The rows are the longest one up to `length` tokens. All passes of the objective count; nothing is dropped out. All
    ranks call it together.

    within  the mode of fake tensors, if the module's are fake
    """
    module, objective, target = work.module, work.objective, unwrap(work.module)
    own = type(objective).loss is not Objective.loss and Need.BATCH_NLL not in objective.needs  # else NTP's
    row: Any = work.data[int(work.data.lengths.argmax())]
    # Two response tokens: what the head takes is arithmetic.
    labelled = np.arange(length) >= length - 2
    row = replace(row, input_ids=row.input_ids[:length], target=labelled, starts=None, weight=None)
    prompts, units = own and Need.PROMPTS in objective.needs, [(Slot(0),) * unit_of(work)]
    batch = collate(units, [row], padding_free=target.padding_free, prompts=prompts)  # type: ignore[arg-type]
    plan = objective.plan(batch, step=0, total_steps=1, seed=0) if own else ntp_plan(batch, batch.ntp_weight)
    plan = replace(plan, unpaired=unpaired_rows(plan.pairs, len(batch.labels)))
    sharded, device = isinstance(module, FSDPModule), next(module.parameters()).device
    batch, plan = to_device((batch, plan), device)
    weights = set() if sharded else {one.untyped_storage()._cdata for one in target.parameters()}
    with (
        within,
        unmoved(objective),
        eval_mode(module, replace(work.world, device=device), work.precision),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        noting_kept(target.model) as found,
    ):
        teacher = None
        if Need.TEACHER in objective.needs:  # whose states nobody but the loss keeps
            teacher = target.read(lambda it: Taught(it.hidden_states(batch).detach(), **it.head.copied()))
        target(batch, plan, loss=objective.loss if own else None, teacher=teacher)
    reshard(module)
    kept = 0
    for key, (_, size) in found.items():
        left = torch.UntypedStorage._new_with_weak_ptr(key)
        if key not in weights and (left is None or left.nbytes()):  # weights that were gathered have no bytes by now
            kept += size
    return kept


def without_values(model: PreTrainedModel, *, halved: bool) -> tuple[TrainingModule, FakeTensorMode]:
    """Return the module that trains a copy of the model on fake tensors, and their mode; no value is copied.

    halved  True: in bfloat16
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    kind = torch.bfloat16 if halved else None
    with fake:
        instead = {id(one): torch.empty_like(one, device="cpu") for one in model.buffers()}
        for one in model.parameters():  # a tied one is met once, and stays one
            like = torch.empty_like(one, device="cpu", dtype=kind)
            instead[id(one)] = nn.Parameter(like, requires_grad=one.requires_grad)
    return TrainingModule(copy.deepcopy(model, instead)), fake


@contextmanager
def noting_kept(model: PreTrainedModel) -> Iterator[dict[int, tuple[StorageWeakRef, int]]]:
    """Note each storage that is kept for the backward, and its bytes; what a layer keeps is then let go.

    If layers are to be computed again there is no room for what all of them keep. Losses need what is outside layers:
    they differentiate in their forward.
    """
    found: dict[int, tuple[StorageWeakRef, int]] = {}
    in_layer = False

    def note(saved: torch.Tensor) -> torch.Tensor | None:
        storage = saved.untyped_storage()
        found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # so that no later storage has this key
        return None if in_layer else saved.detach()  # an output would hold the graph that holds it

    def enter(*_: Any) -> None:
        nonlocal in_layer
        in_layer = True

    def leave(*_: Any) -> None:
        nonlocal in_layer
        in_layer = False

    with ExitStack() as hooks:
        for layer in layers_of(model):
            hooks.enter_context(layer.register_forward_pre_hook(enter))
            hooks.enter_context(layer.register_forward_hook(leave))
        hooks.enter_context(saved_tensors_hooks(note, lambda saved: saved))
        yield found


def unit_of(work: Workload) -> int:
    """Return the rows of a unit: 2 for pairs, which are never cut apart."""
    return max(map(len, work.order.batch(0)))


def slots_of(work: Workload, rows: int) -> int:
    """Return the token slots of so many of the longest rows: at least of a unit, at most of a rank's part of a step."""
    units, unit = work.order.batch(0), unit_of(work)
    of_rank = unit * math.ceil(len(units) / work.world.size)
    return min(max(rows, unit), of_rank) * int(work.data.lengths.max())  # 8 pairs on 2 ranks: from 2 to 8 rows


class Parts(NamedTuple):
    """Bytes at the peak of a step, beside the weights and the optimizer's state."""

    gradients: float
    activations: float
    working: float


class StepLayout(NamedTuple):
    """How a step is made, as far as its memory depends on it.

    several_micro_batches   gradients are there before the last one
    The others are training options.
    """

    several_micro_batches: bool
    activation_checkpointing: bool
    reshard_after_forward: bool
    reduce_each_micro_batch: bool


BACKWARD = 0.4
"""What the backward of a layer has at its peak beside what the layer keeps, as a share of that."""


class Footprint:
    """What a step takes of one rank's memory beside the weights, bytes.

    kept       by a forward for its backward: bytes that do not depend on the tokens (weights in another dtype), and
               bytes of each slot
    optimizer  its state
    teacher    the second weights of an objective that needs them, and a copy of their head
    """

    def __init__(self, work: Workload, kept: tuple[float, float] | None = None) -> None:
        """Count the numbers; kept: of `kept_of`, None: it is measured, and all ranks call this together."""
        options, world = work.options, work.world
        self.kept = kept_of(work) if kept is None else kept
        self.numbers = Numbers(unwrap(work.module).model)
        self.shards, self.size = shards_of(options, world), 2 if work.precision == "bf16" else 4
        self.reduced = 2 if options.reduce_dtype == "bfloat16" and self.shards > 1 else 4
        self.in_buckets = self.shards == 1 and world.size > 1
        self.on_cpu = world.device.type == "cpu"
        # torch's AdamW copies its second moments on a GPU, unless it is fused.
        self.copies = getattr(work.optimizer, "fused", None) is False and not self.on_cpu
        self.optimizer = work.optimizer.state_bytes * self.numbers.whole.trained / self.shards
        vocabulary = self.numbers.head.shape[0]
        second = teacher_bytes(work.objective, unwrap(work.module).model) * self.numbers.whole.trained / self.shards
        # Autocast leaves weights as they are stored; FSDP has gathered the head in the dtype of the computation.
        head = self.numbers.head.nbytes if self.shards == 1 else self.size * self.numbers.head.numel()
        self.teacher = second + head * (Need.TEACHER in work.objective.needs)
        self.chunk = options.chunk_size or default_chunk_size(vocabulary, world.device)
        # On a CPU the loss has float32 copies of a block of half-precision logits: one, or a pair's and their mixture.
        half, mixes = self.size < 4, Need.PAIRS in work.objective.needs
        self.block, self.blocks = block_rows(vocabulary, world.device), self.on_cpu * (half + mixes * (1 + half))

    def peak(self, slots: int, layout: StepLayout) -> Parts:
        """Return the parts at the peak of micro-batches of so many token slots, any of which may be a response token.

        Gradients before the last micro-batch are whole under FSDP; DDP's buckets always have them.
        """
        layout = layout._replace(several_micro_batches=layout.several_micro_batches or self.in_buckets)
        return max(self.at_loss(slots, layout), self.in_layer(slots, layout), self.in_update(layout), key=sum)

    def at_loss(self, slots: int, layout: StepLayout) -> Parts:
        """Return the parts at the loss: the states of response tokens with their gradients, and logits of a chunk."""
        (vocabulary, width), size = self.numbers.head.shape, self.size
        working = slots * width * (size + 8) + min(slots, self.chunk) * size * vocabulary
        working += self.blocks * min(slots, self.chunk, self.block) * 4 * vocabulary
        if size < 4:
            # Copies of the head's weight; on a CPU the product that is added to the sum is also a copy.
            copies = (self.shards == 1) + (self.on_cpu and self.numbers.head_trains)
            working += size * vocabulary * width * copies
        return self._in_backward(slots, layout, working)

    def in_layer(self, slots: int, layout: StepLayout) -> Parts:
        """Return the parts in the backward of a layer, which FSDP overlaps with its neighbours' traffic."""
        layers, n_layers, size = self.numbers.layers, self.numbers.n_layers, self.size
        working = slots * self.kept[1] / n_layers * (BACKWARD + layout.activation_checkpointing)
        if self.shards > 1:
            # The next layer is gathered meanwhile; gradients have the dtype of the product, and are reduced in another.
            working += (2 * size * layers.all + (size + self.reduced) * layers.trained) / n_layers
        return self._in_backward(slots, layout, working)

    def in_update(self, layout: StepLayout) -> Parts:
        """Return the parts after the backward: what is reduced or added up last, or the optimizer's copies."""
        numbers, of_shards = self.numbers, 4 * self.numbers.whole.trained / self.shards
        working = of_shards * self.copies
        if self.shards > 1:
            working = max(working, (self.size + self.reduced) * numbers.embeddings.trained)
        # A tied head's gradient is made apart, and then added.
        if layout.several_micro_batches or (numbers.tied and self.shards == 1):
            working = max(working, self._of_head)
        return Parts(of_shards, 0.0, working)

    @property
    def _of_head(self) -> int:
        """Bytes of the gradient of the head's weight, float32."""
        return 4 * self.numbers.head.numel() * self.numbers.head_trains

    def _in_backward(self, slots: int, layout: StepLayout, working: float) -> Parts:
        """Return what the whole backward holds, and beside it what a phase of it works with."""
        numbers, shards, size = self.numbers, self.shards, self.size
        layers, (constant, each) = numbers.layers, self.kept
        if layout.activation_checkpointing:
            # What goes into the layers is kept, and one layer; autocast's copies of trained weights, to the end.
            cached = constant * layers.trained / max(layers.all, 1) * (shards == 1)
            constant = max(cached, constant / numbers.n_layers)
            each = numbers.n_layers * numbers.head.shape[1] * (4 if shards == 1 else size)
        gathered = size * (numbers.outside.all + layers.all * (not layout.reshard_after_forward)) * (shards > 1)
        before = (
            4 * numbers.whole.trained / (shards if layout.reduce_each_micro_batch else 1) * layout.several_micro_batches
        )
        return Parts(before, constant + slots * each, self._of_head + gathered + working)

    def slots(self, free: float, *, most: int, layout: StepLayout) -> int:
        """Return the most token slots, at most `most`, of micro-batches that take at most `free` bytes."""

        def taken(slots: int) -> float:
            return self.optimizer + sum(self.peak(slots, layout))

        return bisect.bisect_right(range(1, most + 1), free, key=taken)


def kept_of(work: Workload, within: AbstractContextManager[Any] | None = None) -> tuple[float, float]:
    """Return the bytes that a forward keeps for its backward whatever the tokens are, and of each slot.

    within  the mode of fake tensors, if the module's are fake: its other ranks are not there
    """
    # An attention that holds a number for each two tokens keeps most of a slot in the longest row.
    longest = int(work.data.lengths.max())
    length = min(longest, MEASURED) if work.world.device.type == "cpu" and within is None else longest
    constant, most = (kept_by_forward(work, tokens, within or nullcontext()) for tokens in (2, length))
    return constant, (most - constant) / (unit_of(work) * max(length - 2, 1))
