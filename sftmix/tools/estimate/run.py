"""The needs of a run before anything of it is started: memory of each device, hours of each stage and of the whole.

    from sftmix.tools.estimate.run import Machine, estimate
    estimate(config, machine)["device_hours"]  # a Machine has the options of the command line

The rows are read and tokenised, and the run will find them in the cache. Only the configs of the models are read.

FLOPs are multiplications and additions of matrices. A matrix takes 2 per number and token in the forward and 4 in the
backward (2 if it is frozen). The head is multiplied with response tokens alone. Mixup adds no matrix product.

Memory is one rank's: forward and backward of the shipped modules on fake tensors, which have shapes and no
storage, under torch's `MemTracker`; the other ranks are of the fake process group, which sends nothing. Weights, which
may be in 4 bits, and the optimizer's state and temporaries are reckoned.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.components.base import Objective, Optimizer
from sftmix.components.component import Need
from sftmix.components.objectives import NTP
from sftmix.config import RunConfig
from sftmix.config.checks import refuse_sharded
from sftmix.functional import fused
from sftmix.model.adapters import add_adapters
from sftmix.model.layers import decoder_layers, keep_in_bfloat16, recompute_activations
from sftmix.model.load import stored_dtype
from sftmix.model.meta import empty_model
from sftmix.options import LoraOptions
from sftmix.pipeline.rows import read_rows
from sftmix.tools.estimate.work import FLOAT, HALF, Layout, Machine, Work, plan
from sftmix.training.memory import PeakMemory
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import autocast, gradient_sync, wrap
from sftmix.types import Batch, Float64

__all__ = ["Machine", "estimate"]

CPU = torch.device("cpu")

MEASURE = (
    "Measure instead: run with --training.max_steps 2 --checkpoint.every 0, and see peak_memory_bytes and elapsed in "
    "its summary.json"
)

BLOCK_CELLS = 2**22
"""Logits of a block for a GPU, whose kernels need none: few fake operations, and 50 MB at most."""

QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a 4-bit layer: 4 bits, an 8-bit scale per 64 numbers, a float32 scale per 256 of those scales."""


# ------------------------------------------------------------------------------------------- models and FLOPs


class Count:
    """How many numbers some parameters have: all of them, and those that are trained."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.all = self.trained = 0
        for parameter in parameters:
            self.all += parameter.numel()
            self.trained += parameter.numel() * parameter.requires_grad


class FakeModel:
    """A causal language model without weights, of which only the config is read.

    numbers        all numbers; a tied weight's count once
    layers         numbers of the decoder layers
    outside        numbers of embeddings, last norm and head
    per_token      numbers of the backbone's matrices; embeddings are looked up, not multiplied with
    stored_bytes   bytes of the weights: float32; of a frozen base bfloat16 or 4 bits
    head           the weight of the LM head, [V, D]
    in_4_bits      the layers whose weights bitsandbytes stores so
    attention_width  numbers of all heads of a layer; 0 for a model without attention
    """

    def __init__(self, path: str, attention: str | None, lora: LoraOptions, *, in_bf16: bool = False) -> None:
        """Arguments as model.path, model.attention and model.lora; ConfigError for a model that cannot be built.

        in_bf16  it computes in bfloat16, and has adapters or is not trained
        """
        known = attention if attention in (None, "eager") else "sdpa"
        try:
            self.model = model = empty_model(path, attention=known)
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"model.path: cannot build the model of {path}: {error}") from error
        if lora.r:
            add_adapters(model, lora, seed=0)
        elif lora.quantize:  # nothing is trained, and all of it is in 4 bits
            model.requires_grad_(False)
        if in_bf16 and stored_dtype(path) == torch.bfloat16:
            keep_in_bfloat16(model, trains=bool(lora.r))
        decoder, config = model.get_decoder(), model.config.get_text_config()
        self.head = model.get_output_embeddings().weight
        self.numbers = Count(model.parameters())
        self.in_4_bits = []
        self.stored_bytes: float = sum(weight.nbytes for weight in model.parameters())
        for layer in model.modules() if lora.quantize else ():
            # bitsandbytes stores frozen linear layers in 4 bits, but not the head.
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad and layer.weight is not self.head:
                self.in_4_bits.append(layer)
                self.stored_bytes += QUANTIZED_BYTES * layer.weight.numel() - layer.weight.nbytes
                layer.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))
        layers = decoder_layers(model)
        inside = {p for layer in layers for p in layer.parameters()}
        self.n_layers, self.layers = len(layers), Count(inside)
        used = {*decoder.parameters(), *model.get_output_embeddings().parameters()}  # no vision tower
        self.outside = Count(used - inside)
        looked_up = {one.weight for one in decoder.modules() if isinstance(one, nn.Embedding)}
        self.per_token = Count(p for p in decoder.parameters() if p.dim() > 1 and p not in looked_up)
        heads = getattr(config, "num_attention_heads", 0)
        self.attention_width = heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def forward_flops(model: FakeModel, amount: Float64) -> tuple[float, float, float]:
    """FLOPs of the backbone's matrices, of attention, and of the head; the amount is from `amount_of`.

    Attention is the product for the scores and the one with the values: 2 FLOPs each per number of a head and pair of
    positions, of which the causal mask leaves half.
    """
    tokens, targets, squares = amount.tolist()
    attention = 2.0 * model.attention_width * model.n_layers * squares
    return 2.0 * model.per_token.all * tokens, attention, 2.0 * model.head.numel() * targets


def training_flops(model: FakeModel, amount: Float64, *, recompute: bool) -> float:
    """Forward and backward; recompute (activation checkpointing): the forward of the backbone counts twice."""
    matrices, attention, head = forward_flops(model, amount)
    inputs = matrices + 2 * attention + head
    weights = 2.0 * model.per_token.trained * amount[0] + head * model.head.requires_grad
    return (matrices + attention) * (1 + recompute) + head + inputs + weights


# ------------------------------------------------------------------------------------------------------ stages


def estimate(config: RunConfig, machine: Machine) -> dict[str, Any]:
    """The needs of `run` with this configuration, as `--json` prints them: bytes, FLOPs, seconds and hours.

    Raises the errors of the options, the rows and the configs of the models.
    """
    config, rows = read_rows(config, World(), progress=True)
    process = PeakMemory(CPU).bytes() if machine.device == CPU else 0
    stages = {work.name: _stage(work, config, machine, process) for work in plan(config, rows, machine)}
    flops = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    hours = [stage["device_hours"] for stage in stages.values()]
    return {
        "machine": vars(machine),
        "examples": len(rows.data.train),
        "tokens": int(rows.data.train.lengths.sum()),
        "stages": stages,
        "device_hours": None if None in hours else sum(hours),
        "times_plain": flops / stages["train"]["training_flops"],  # 1: the target's training alone
    }


def _stage(work: Work, config: RunConfig, machine: Machine, process: int) -> dict[str, Any]:
    """FLOPs and hours of all devices together, bytes that each one sends and holds.

    Computation and communication overlap: FSDP gathers a layer while the layer before it computes, DDP sends gradients
    during the backward. So the longer one counts; if they do not overlap well, the true time is up to twice as long.
    """
    layout = Layout(work.options, machine)
    in_bf16 = layout.size == HALF and bool(work.lora.r or not work.largest)
    model = FakeModel(work.model_path, config.model.attention, work.lora, in_bf16=in_bf16)
    if layout.shards > 1 and work.largest:
        refuse_sharded(config.optimizer, work.lora, f"training.parallel {work.options.parallel} (here sharded)")
    mixes = work.name == "train" and Need.BATCH_NLL not in config.objective.needs
    objective = config.objective if mixes else NTP()
    memory = {"process": process, **memory_of(work, model, objective, config.optimizer, layout, machine)}
    memory["peak"] = sum(memory.values())
    training = training_flops(model, work.trained, recompute=work.options.activation_checkpointing)
    scoring = sum(forward_flops(model, work.read))
    weights, gradients, averages = traffic(work, model, layout)
    computing = communicating = hours = None
    if machine.bandwidth and machine.node_bandwidth:
        in_nodes = machine.per_node % layout.shards == 0
        of_shards = machine.node_bandwidth if in_nodes else machine.bandwidth
        communicating = (weights + gradients) / of_shards + averages / machine.bandwidth
    if peak := machine.flops if layout.size == HALF else machine.fp32_flops:
        speed = peak * machine.mfu * machine.count
        computing = training / max(work.steps, 1) / speed
        hours = (scoring / speed + work.steps * max(computing, communicating or 0.0)) * machine.count / 3600
    return {
        "model": work.model_path,
        "numbers": model.numbers.all,
        "trained": model.numbers.trained * bool(work.steps),
        "steps": work.steps,
        "training_tokens": round(work.trained[0]),
        "scored_tokens": round(work.read[0]),
        "training_flops": training,
        "scoring_flops": scoring,
        "device_hours": hours,
        "step": {
            "micro_batches": work.micro_batches,
            "sent_bytes_per_device": {"weights": weights, "gradients": gradients, "averages": averages},
            "computing_seconds": computing,
            "communicating_seconds": communicating,
        },
        "memory_bytes": memory,
        "fits": None if machine.memory is None else memory["peak"] <= machine.memory,
    }


def traffic(work: Work, model: FakeModel, layout: Layout) -> tuple[float, float, float]:
    """Bytes that each device sends, and receives, in one optimizer step; 0 without steps.

    Of weights and of gradients to the devices that share a copy of the weights with it, and of gradients to those that
    hold other copies.

    Ranks form a ring: each passes on (n - 1) / n of a tensor that is gathered or reduced, twice as much of an average.
    Each pass through the backbone gathers the decoder layers, and again for the backward; the rest is gathered once per
    micro-batch. The last micro-batch of a step reduces gradients to shards, which copies of the weights then average
    (hsdp; under ddp each rank has a copy). If it has several passes, FSDP sends the layers' gradients that earlier
    micro-batches left with its first pass, and its own with the last.
    """
    copies, ring = layout.copies, (layout.shards - 1) / layout.shards
    weights = 2 * model.layers.all * work.passes + model.outside.all * work.micro_batches
    twice = layout.shards > 1 and work.passes > work.micro_batches > 1
    gradients = (model.outside.trained + model.layers.trained * (1 + twice)) * bool(work.micro_batches)
    gradients *= FLOAT
    return layout.size * ring * weights, ring * gradients, 2 * (copies - 1) / copies / layout.shards * gradients


# ----------------------------------------------------------------------------------------------------- memory


def memory_of(
    work: Work, model: FakeModel, objective: Objective, optimizer: Optimizer, layout: Layout, machine: Machine
) -> dict[str, int]:
    """Return the bytes of each part on one device; ConfigError for a model that looks at values, as experts do."""
    for part in model.model.modules():
        if "Experts" in type(part).__name__:  # so transformers calls them in every family
            raise ConfigError(
                f"model.path: {work.model_path} routes tokens to experts ({type(part).__name__}), and estimate would "
                f"count all of them for each token. {MEASURE}"
            )
    share, state = FLOAT * model.numbers.trained / layout.shards, 0.0
    if work.largest is None:  # FSDP has gathered two layers (the next one comes) and what is outside the layers
        gathered = 2 * model.layers.all / model.n_layers + model.outside.all
        held = 0.0, 0.0, layout.size * gathered * (layout.shards > 1)
    else:
        state = optimizer.state_bytes * share / FLOAT
        try:
            held = _held_in_a_step(work, work.largest, model, objective, layout, machine)
        except RuntimeError as error:
            raise ConfigError(
                f"model.path: estimate cannot follow {work.model_path}, whose computation may depend on "
                f"values: {error}. {MEASURE}"
            ) from error
        if sum(held) < 2 * share:  # the optimizer's step, with temporaries
            held = share, 0.0, share
    parts = ("weights", "optimizer", "gradients", "activations", "working")
    sizes = (model.stored_bytes / layout.shards, state, *held)
    return dict(zip(parts, map(round, sizes), strict=True))


class _Tracker(MemTracker):
    """torch's tracker without its statistics of modules, for which each may be called once."""

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _nothing

    def total(self, kind: str = "current") -> int:
        return self.get_tracker_snapshot(kind)[CPU]["Total"]


def _held_in_a_step(
    work: Work, batch: Batch, model: FakeModel, objective: Objective, layout: Layout, machine: Machine
) -> tuple[float, float, float]:
    """Return bytes before a micro-batch, those that its forward adds, and those at the peak besides."""
    shards, precision = layout.shards, "bf16" if layout.size == HALF else "fp32"
    cells = fused.CPU_BLOCK_CELLS
    if machine.device != CPU:
        cells = BLOCK_CELLS
        # No attention gets a mask there.
        batch = replace(batch, segments=tuple(replace(s, position_ids=None, padded=False) for s in batch.segments))
    if work.options.activation_checkpointing:
        recompute_activations(model.model)
    for layer in model.in_4_bits if layout.size == HALF else ():  # bitsandbytes makes them anew at each use
        layer.bfloat16()
    chunk = work.options.chunk_size or fused.default_chunk_size(len(model.head), machine.device)
    module, tracker = TrainingModule(model.model.train(), chunk_size=chunk), _Tracker()
    plan = objective.plan(batch, step=0, total_steps=1, seed=0)
    plan = replace(plan, alone=fused.rows_alone(plan.pairs, len(batch.labels)))
    # DDP's buckets hold the whole gradient from the start, as one rank does after a micro-batch.
    several = work.micro_batches > 1 or (shards == 1 and layout.copies > 1)
    world = World(size=machine.count)
    with _ranks(world), mock.patch.object(fused, "CPU_BLOCK_CELLS", cells):
        if shards > 1:
            parallel = "fsdp" if layout.copies == 1 else "hsdp"
            wrap(module, parallel=parallel, precision=precision, world=world, shard_group_size=shards)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.to_empty(device=CPU)
            if shards == 1:
                model.model.tie_weights()  # each parameter was made fake by itself
            tracker.track_external(module)
            stored = tracker.total()
            with tracker:
                for last in [False, True] if several else [True]:  # the peak is that of the last micro-batch
                    before = tracker.total()
                    with gradient_sync(module, last):
                        with autocast(module, precision, CPU):
                            loss = module(batch, plan, loss=objective.loss).loss
                        saved = tracker.total() - before
                        loss.backward()
    return before - stored, saved, tracker.total("peak") - before - saved


@contextlib.contextmanager
def _ranks(world: World) -> Iterator[None]:
    """Ranks of which only this one is there."""
    options = FakeProcessGroup.Options()  # type: ignore[call-arg]  # with the timeout that `wrap` looks for
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size, pg_options=options)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout")
            yield
    finally:
        dist.destroy_process_group()
