"""The memory of one rank: forward and backward of the shipped modules on fake tensors, which have shapes and no
storage, under torch's `MemTracker`; the other ranks are of the fake process group, which sends nothing.

Weights, which may be in 4 bits, and the optimizer's state and temporaries are reckoned.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.components.base import Objective, Optimizer
from sftmix.functional import fused
from sftmix.model.layers import recompute_activations
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.work import FLOAT, HALF, Layout, Machine, Work
from sftmix.training.module import TrainingModule, autocast, gradient_sync
from sftmix.training.parallel import wrap
from sftmix.types import Batch

CPU = torch.device("cpu")

BLOCK_CELLS = 2**22
"""Logits of a block for a GPU, whose kernels need none: few fake operations, and 50 MB at most."""


def memory_of(
    work: Work, model: FakeModel, objective: Objective, optimizer: Optimizer, layout: Layout, machine: Machine
) -> dict[str, int]:
    """Return the bytes of each part on one device; ConfigError for a model that looks at values."""
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
                f"model.path: estimate cannot follow {work.model_path}: {error}. Models whose computation depends on "
                "values (experts to which tokens are routed) have none here. Measure instead: run with "
                "--training.max_steps 2 --checkpoint.every 0, and see peak_memory_bytes and elapsed in its summary.json"
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
    if machine.device != CPU:  # where no attention gets a mask
        batch = replace(batch, segments=tuple(replace(s, position_ids=None, padded=False) for s in batch.segments))
    if work.options.activation_checkpointing:
        recompute_activations(model.model)
    for layer in model.in_4_bits if layout.size == HALF else ():  # bitsandbytes makes them anew at each use
        layer.bfloat16()
    chunk = work.options.chunk_size or fused.default_chunk_size(model.head_shape[0], machine.device)
    module, tracker = TrainingModule(model.model.train(), chunk_size=chunk), _Tracker()
    plan = objective.plan(batch, step=0, total_steps=1, seed=0)
    plan = replace(plan, alone=fused.rows_alone(plan.pairs, len(batch.labels)))
    # DDP's buckets hold the whole gradient from the start, as one rank does after a micro-batch.
    several = work.micro_batches > 1 or (shards == 1 and layout.copies > 1)
    world = World(size=machine.count, local_size=machine.per_node)
    cells = fused.CPU_BLOCK_CELLS if machine.device == CPU else BLOCK_CELLS
    with _ranks(world), mock.patch.object(fused, "CPU_BLOCK_CELLS", cells):
        if shards > 1:
            kind = "fsdp" if layout.copies == 1 else "hsdp"
            wrap(module, parallel=kind, precision=precision, world=world, shard_group_size=shards)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.to_empty(device=CPU)
            if shards == 1:
                model.model.tie_weights()  # each parameter was made fake by itself
            tracker.track_external(module)
            stored = tracker.total()
            with tracker:
                for last in (False, True)[not several :]:
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
