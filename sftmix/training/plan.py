"""What auto means for the layout of a step: the layouts that it may have, and the cheapest that fits.

Memory is that of `sftmix.training.footprint`. Time is a roofline, which compares layouts and predicts no step: products
at the peak of a data sheet, bytes over its bandwidths, and launches. What ranks send is hidden behind what they
compute, or hides it, but for embeddings. Attention is left out, and so is padding: all layouts have the same.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from sftmix.components.component import Need
from sftmix.model.packing import is_skipping
from sftmix.options.training import DEFAULT_MICRO_BATCH, SHARDED, TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.footprint import Footprint, StepLayout, Workload, kept_of, slots_of, without_values
from sftmix.training.gpus import NETWORK, Gpu
from sftmix.training.numbers import Count
from sftmix.training.parallel import PADDED_TOKENS, resolve_parallel

USABLE = 0.9
"""Share of the free memory for which steps are planned: kernels have workspaces, and free memory has gaps."""

REACHED = 0.78
"""Share of a data sheet's figures that an H200 reached: 772 of 989 TFLOP/s, and NCCL 350 of 450 GB/s in a direction."""
ACTIVATIONS = 3
"""How often a step moves what a forward keeps: 0.35 MB a token and compiled layer of 1.2B, of which 0.12 are kept."""
LAUNCHES = 1e-3
"""Seconds that a pass takes for each layer whatever its tokens are: 16 ms of a step of 16 compiled layers."""


class StepPlan(NamedTuple):
    """A layout of a step with what it takes.

    parallel  none, ddp, fsdp or hsdp
    slots     token slots of a micro-batch, at most
    need      bytes at the peak, beside the weights
    free      bytes that there are beside the weights
    seconds   of a mean step by the roofline; None: the figures of the device are not known
    """

    parallel: str
    layout: StepLayout
    slots: int
    need: float
    free: float
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.need <= USABLE * self.free

    def __str__(self) -> str:
        layout = [f"{name} {str(value).lower()}" for name, value in self.layout._asdict().items()]
        layout = layout if self.parallel in SHARDED else layout[:2]  # the others say nothing then
        time = "" if self.seconds is None else f", {self.seconds:.2g} s by roofline"
        need = f"{self.need / 2**30:.1f} of {USABLE * self.free / 2**30:.1f} GiB"
        named = ", ".join([self.parallel, *layout, f"at most {self.slots:,} slots at once"])
        return f"{named} ({need} beside the weights{time})"

    def decided(self, options: TrainingOptions) -> TrainingOptions:
        """Return the options with this plan in the place of each auto that it decides."""
        given = {**self.layout._asdict(), "parallel": self.parallel, "micro_batch_tokens": self.slots}
        return replace(options, **{name: x for name, x in given.items() if getattr(options, name, None) == "auto"})


def step_plans(
    memories: Mapping[str, Footprint], work: Workload, free: Mapping[str, float], *, padded: bool, gpu: Gpu | None
) -> list[StepPlan]:
    """Return the plans of a step that the options allow, in the order in which those of an unknown device are tried.

    That order is, each before what is behind it:

        fsdp, hsdp, ddp
        layers that are kept, layers that are recomputed
        one micro-batch, several with gradients reduced at the end, several with gradients reduced in each
        layers that are gathered twice, layers that are gathered once

    memories  by the values of training.parallel
    free      bytes beside the weights, by the same
    padded    rows are padded in a micro-batch
    """
    found = []
    for parallel, memory in memories.items():
        for layout in _layouts(work, memory.numbers.recomputes, sharded=parallel in SHARDED):
            slots = _slots(memory, work, layout, free[parallel], PADDED_TOKENS if padded else sys.maxsize)
            if slots is not None:
                need = memory.optimizer + sum(memory.peak(slots, layout))
                seconds = gpu and seconds_of(memory, work, layout, slots, gpu)
                found.append(StepPlan(parallel, layout, slots, need, free[parallel], seconds))
    return found


def by_cost(found: Sequence[StepPlan]) -> list[StepPlan]:
    """Return the plans that fit, the cheapest first. Plans whose times are equal to two digits keep their order.

    If none fits, return all of them, and first the one that lacks least memory.
    """
    fitting = sorted((plan for plan in found if plan.fits), key=lambda plan: float(f"{plan.seconds or 0.0:.2g}"))
    return fitting or sorted(found, key=lambda plan: plan.need - plan.free)


def said(found: Sequence[StepPlan]) -> str:
    """Return a line: the best plan, of how many, and the second."""
    best, *others = by_cost(found)
    fit = sum(plan.fits for plan in found)
    order = "the cheapest" if best.seconds else "the first, as the speed of the device is not known,"
    line = f"{best}: {order if fit else 'the least memory'} of {len(found)} plans, of which {fit} fit"
    return f"{line}; the second is {others[0]}" if others else line


def imitated(model: PreTrainedModel, work: Workload, parallels: Sequence[str]) -> dict[str, Footprint]:
    """Return what a step takes under each value of training.parallel, followed on fake tensors.

    work  whose module is replaced, and need not be there
    Raises what the model raises on fake tensors.
    """
    kept, found = {}, {}
    for parallel in parallels:
        halved = work.precision == "bf16" and parallel in SHARDED  # FSDP computes with bf16 weights, not by autocast
        module, fake = without_values(model, halved=halved)
        options: Any = {"parallel": parallel}
        one = work._replace(module=module, options=replace(work.options, **options))
        if halved not in kept:
            kept[halved] = kept_of(one, fake)
        found[parallel] = Footprint(one, kept[halved])
    return found


def parallels_of(options: TrainingOptions, world: World, *, by_node: bool) -> list[str]:
    """Return the values of training.parallel among which is chosen; by_node: nodes have as many ranks, in order."""
    if options.parallel != "auto" or world.device.type == "cpu" or world.size == 1:
        return [resolve_parallel(options.parallel, world)]
    return ["fsdp", *["hsdp"] * (by_node and world.size > world.local_size), "ddp"]


def shares_rows(options: TrainingOptions, attention: str | None, device: torch.device) -> bool:
    """Return whether examples will share a row, unless a probe then finds that the model mixes them."""
    if options.padding_free != "auto":
        return options.padding_free
    return options.length_groups is None and is_skipping(attention, device)


def _layouts(work: Workload, recomputes: bool, *, sharded: bool) -> list[StepLayout]:
    """Return the layouts that options, device, model and objective allow, fitting or not, in their order."""
    on_gpu = work.world.device.type != "cpu"

    def values(name: str, first: bool, *, free: bool) -> list[bool]:
        asked = getattr(work.options, name)
        return [first, not first][: 1 + (free and on_gpu)] if asked == "auto" else [asked]

    recompute = values("activation_checkpointing", False, free=recomputes and Need.STATES not in work.objective.needs)
    reduce_each = values("reduce_each_micro_batch", False, free=sharded)
    reshard = values("reshard_after_forward", True, free=sharded)
    passes = [(False, reduce_each[0]), *[(True, each) for each in reduce_each]]
    return [
        StepLayout(several, again, twice, each) for again, (several, each), twice in product(recompute, passes, reshard)
    ]


def _slots(memory: Footprint, work: Workload, layout: StepLayout, free: float, limit: int) -> int | None:
    """Return the token slots of a micro-batch of a layout; None if a micro-batch of that size has another layout.

    As many as fit: at least those of a pair of the longest rows, at most those of a rank's part of a global batch of
    such rows (if the memory is not known, of DEFAULT_MICRO_BATCH), and at most `limit`. A CPU's count always has
    several micro-batches.
    """
    kind, part = work.world.device.type, slots_of(work, sys.maxsize)
    whole = math.inf if kind == "cpu" else part
    rows, slots = work.options.limits(kind)
    if slots == "auto":
        most = slots_of(work, DEFAULT_MICRO_BATCH) if math.isinf(free) else part
        fitting = memory.slots(USABLE * free, most=most, layout=layout) if layout.several_micro_batches else most
        slots = min(max(fitting, slots_of(work, 1)), limit)
    slots = slots or slots_of(work, rows or sys.maxsize)
    return slots if layout.several_micro_batches == (slots < whole) else None


# ------------------------------------------------------------------------------------------------- time


def seconds_of(memory: Footprint, work: Workload, layout: StepLayout, slots: int, gpu: Gpu) -> float:
    """Return the seconds of a mean step by the roofline."""
    tokens, numbers = float(work.data.lengths.mean()) * work.options.global_batch_size / work.world.size, memory.numbers
    passes = math.ceil(tokens / slots) if layout.several_micro_batches else 1

    def sending(part: Count, gathers: int) -> float:
        gathered = passes * gathers * memory.size * part.all
        reduced = memory.reduced * part.trained * (passes if layout.reduce_each_micro_batch else 1)
        return _sending(memory, work.world, gpu, gathered, reduced)

    # FSDP gathers embeddings before the first layer, and reduces their gradients after the last one.
    exposed = sending(numbers.embeddings, 1)
    hidden = sending(numbers.outside, 1) - exposed + sending(numbers.layers, 1 + layout.reshard_after_forward)
    return exposed + max(hidden, _computing(memory, layout, tokens, passes, gpu))


def _computing(memory: Footprint, layout: StepLayout, tokens: float, passes: int, gpu: Gpu) -> float:
    """Return the seconds of products, of bytes that pass through memory, and of launches."""
    numbers, again = memory.numbers, layout.activation_checkpointing
    layers, head, trained = numbers.layers, numbers.head.numel(), numbers.whole.trained
    products = 2 * tokens * (layers.all * (2 + again) + layers.trained + head * (2 + numbers.head_trains))
    moved = tokens * memory.kept[1] * (ACTIVATIONS + again)
    moved += passes * (memory.size * (layers.all * (2 + again) + 2 * head) + 8 * trained)  # gradients are added up
    moved += 28 * trained / memory.shards  # AdamW reads weight, gradient and moments, and writes all but the gradient
    launches = passes * numbers.n_layers * LAUNCHES * (1 + again / 3)
    return (products / (1e12 * gpu.tflops) + moved / (1e12 * gpu.memory)) / REACHED + launches


def _sending(memory: Footprint, world: World, gpu: Gpu, gathered: float, reduced: float) -> float:
    """Return the seconds in which ranks gather so many bytes of weights, and reduce so many of gradients."""
    shards, copies = memory.shards, world.size // memory.shards

    def rate(ranks: int, rings: int) -> float:
        """Bytes a second in each of the rings, which divide the links of a node to others."""
        link = 1e9 * gpu.link / 2
        return link if ranks <= world.local_size else min(link, world.local_size * NETWORK / rings)

    among_shards = (gathered + reduced) * (1 - 1 / shards) / rate(shards, 1)
    among_copies = 2 * reduced / shards * (1 - 1 / copies) / rate(world.size, shards)  # ddp's, and hsdp's
    return (among_shards + among_copies) / REACHED
