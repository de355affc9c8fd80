"""The wrapping of the module that trains: DDP, FSDP and HSDP, precision, compiled layers, shared rows.

DDP and FSDP2 both average gradients over ranks, so the step multiplies its sums by the world size and divides by counts
reduced over all ranks.
"""

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from sftmix.model.experts import expert_weights
from sftmix.model.layers import decoder_layers, recompute_activations, unused_modules
from sftmix.model.meta import fill
from sftmix.model.packing import (
    attending,
    attention_of,
    check_attention,
    cudnn_attention,
    is_skipping,
    packing_problem,
)
from sftmix.model.rounding import routers_in_float32
from sftmix.model.varlen import VARLEN
from sftmix.options.training import SHARDED, TrainingOptions
from sftmix.ranks.launcher import needs_torchrun
from sftmix.ranks.world import World
from sftmix.training.mesh import mesh_of
from sftmix.training.module import TrainingModule
from sftmix.training.replicated import replicated
from sftmix.types import Int64
from sftmix.words.errors import ConfigError

PADDED_TOKENS = 16_384
"""Most padded token slots of a micro-batch under training.micro_batch_tokens auto. A pass costs a GPU about as much as
3,000 more slots; beyond this number two passes, of similar lengths each, save more than that."""

RECOMPILE_LIMIT = 32
"""Largest number of compiled variants of a layer: with and without mask, gradients, one example or several, ..."""


def unwrap(wrapped: Any) -> TrainingModule:
    """Return the module inside DDP; FSDP2 changes the module in place, so there it is the module itself."""
    return wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped


def gradient_sync(wrapped: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Reduce gradients over ranks only if `enabled`, as in the last micro-batch of a step.

    Use it around forward and backward: around the backward alone it would do nothing under DDP, and under FSDP head and
    norm are there until its end.
    """
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not enabled:
        return wrapped.no_sync()
    after = contextlib.ExitStack()
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
        after.callback(reshard, wrapped)
    return after


def reshard(wrapped: nn.Module) -> None:
    """Free what a forward without a backward has left gathered under FSDP: the optimizer is made of the shards."""
    for part in wrapped.modules():
        if isinstance(part, FSDPModule):  # whose own method leaves the groups within it as they are
            part.reshard()


def autocast(wrapped: nn.Module, precision: str, device: torch.device) -> torch.autocast:
    """Return bf16 autocast; it is off under FSDP, whose policy already computes in bf16."""
    enabled = precision == "bf16" and not isinstance(wrapped, FSDPModule)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def pads(wrapped: nn.Module, lengths: Int64) -> bool:
    """Return True if rows of these lengths i64[N] are padded in a micro-batch: they differ, and share no line."""
    return not unwrap(wrapped).padding_free and len({*lengths.tolist()}) > 1


def without_cudnn_if_padded(wrapped: nn.Module, lengths: Int64) -> contextlib.AbstractContextManager[None]:
    """Leave out cuDNN's attention while rows are padded."""
    return cudnn_attention(not pads(wrapped, lengths))


def training_module(
    model: PreTrainedModel,
    options: TrainingOptions,
    *,
    precision: str,
    world: World,
    attention: str | None = None,
    packed: bool = False,
    trains: bool = False,
) -> nn.Module:
    """Return the wrapped module that trains or scores the model; it keeps the examples of one row apart.

    attention  as the user has named it (model.attention); None: on CUDA a model with sdpa may get varlen instead
    packed     some examples hold several documents
    trains     gradients are wanted
    Raises ConfigError if the attention cannot do this on the device.
    """
    check_attention(model, world.device, trains=trains)
    parallel = resolve_parallel(options.parallel, world)
    if not trains:  # no buckets for gradients, and no copies of weights that autocast keeps for a backward
        model.requires_grad_(False)
        parallel = "none" if parallel == "ddp" else parallel
    module = wrap(
        TrainingModule(model, chunk_size=options.chunk_size),
        parallel=parallel,
        precision=precision,
        world=world,
        shard_group_size=options.shard_group_size,
        reshard_after_forward=options.reshard_after_forward is not False or not trains,
        reduce_dtype=getattr(torch, options.reduce_dtype),
    )
    unwrap(module).padding_free = _shares_rows(
        module, options, precision=precision, world=world, attention=attention, packed=packed
    )
    if trains:
        if world.is_main and (experts := expert_weights(model)):
            dtype, way = "bfloat16" if precision == "bf16" else "float32", model.config._experts_implementation
            print(f"{len(experts)} weights of experts compute in {dtype}, as linear layers do ({way})", flush=True)
        prepare_layers(model, options)  # last, so that no shapes of probes are compiled
    return module


def prepare_layers(model: PreTrainedModel, options: TrainingOptions) -> None:
    """Let layers be recomputed and compiled as the options say, if they say so already: auto is decided later.

    Layers are compiled by themselves: they share the code, and names stay; lengths differ from batch to batch.
    """
    if options.activation_checkpointing is True:
        recompute_activations(model)
    if options.compile is not True:
        return
    from torch._dynamo import config  # takes a second to import
    from torch.fx.experimental import _config as shapes

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    shapes.use_duck_shape = False  # else a batch as long as the states are wide has a graph of its own
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def _shares_rows(
    module: nn.Module, options: TrainingOptions, *, precision: str, world: World, attention: str | None, packed: bool
) -> bool:
    """Return True if the examples of a micro-batch share a row: as asked, or (auto) if the attention then skips work.

    On CUDA a model with sdpa, if nobody named it, gets attention varlen then, unless a probe finds something against
    it; else it keeps its own. Raises ConfigError if examples or documents, as asked for, would not be kept apart.
    """
    model, auto = unwrap(module).model, options.padding_free == "auto"
    own = attention_of(model)
    first = None
    one_row = options.padding_free is True or (auto and options.length_groups is None)
    # Tried in order. auto on CUDA: of sdpa (varlen, True), (sdpa, False); of flash attention True, then False.
    ways = [(own, one_row and (is_skipping(own, world.device) or not auto))]
    if one_row and attention is None and own == "sdpa" and is_skipping(None, world.device):
        ways.insert(0, (VARLEN, True))
    if auto:
        ways.append((own, False))
    for name, one_row in ways:
        with attending(model, name):
            problem = _row_problem(module, precision=precision, world=world, one_row=one_row, packed=packed)
        first = first or problem
        if problem is None:
            break
    else:
        raise ConfigError(problem)
    model.get_decoder().config._attn_implementation = name
    if world.is_main and (first or is_skipping(None, world.device)):
        print(
            f"micro-batches are {'not ' * one_row}padded, with attention {name} (training.padding_free "
            f"{str(options.padding_free).lower()}){': ' * bool(first)}{first or ''}",
            flush=True,
        )
    return one_row


def _row_problem(module: nn.Module, *, precision: str, world: World, one_row: bool, packed: bool) -> str | None:
    """Return, on every rank, what a probe finds against rows of several documents or attention varlen; None if nothing.

    Raises ConfigError if the model fails in the probe under FSDP, which does not survive that.
    """
    target = unwrap(module)
    if not (one_row or packed or attention_of(target.model) == VARLEN):
        return None
    try:
        with autocast(module, precision, world.device):
            problem = target.read(lambda it: packing_problem(it.model, padding_free=one_row))
    except ConfigError as error:
        if isinstance(module, FSDPModule):
            raise
        problem = str(error)
    reshard(module)
    return next(filter(None, world.gather(problem)), None)


def resolve_parallel(requested: str, world: World) -> str:
    """Turn auto into ddp or fsdp, and ddp on a single rank into none."""
    if requested == "auto":
        requested = "fsdp" if world.device.type != "cpu" and world.size > 1 else "ddp"
    return "none" if requested == "ddp" and world.size == 1 else requested


def resolve_precision(requested: str, device: torch.device) -> str:
    """Turn auto into bf16 on a GPU that has it, else fp32."""
    if requested != "auto":
        return requested
    has_it = device.type != "cpu" and torch.get_device_module(device).is_bf16_supported(including_emulation=False)
    return "bf16" if has_it else "fp32"


def wrap(
    module: TrainingModule,
    *,
    parallel: str,
    precision: str,
    world: World,
    shard_group_size: int | None = None,
    reshard_after_forward: bool = True,
    reduce_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Wrap the module, whose forward runs backbone, head and losses.

    fsdp: all ranks share one copy of the weights; hsdp: each group of neighbouring ranks does. They are gathered in one
    group per decoder layer, one per router that stays in float32, one for the input embeddings, one for last norm and
    head (`_norm_and_head`), and one for the rest. All but the layers are gathered once per forward and kept until the
    backward is done; `reshard_after_forward` False keeps the layers so as well. Modules that no forward runs have
    groups of their own, which stay sharded. Each group moves to the device when it is sharded. The values that a model
    on the meta device carries go into the shards: no rank holds the whole model. Without shards each rank takes them
    whole.
    """
    if parallel not in SHARDED:
        check = fill(module.model)
        module.to(world.device)
        if check:
            with autocast(module, precision, world.device):
                module.head = check(module.model)
        return module if parallel == "none" else replicated(module, precision=precision, world=world)
    if not dist.is_initialized():
        raise ConfigError(needs_torchrun(parallel))
    group = shard_group(shard_group_size, world) if parallel == "hsdp" else world.size
    mesh = mesh_of(_get_default_group(), world, group)
    dtypes: Any = {"param_dtype": torch.bfloat16} if precision == "bf16" else {}
    if dtypes or reduce_dtype != torch.float32:  # None: that of the parameters
        dtypes["reduce_dtype"] = reduce_dtype
    layers = [*decoder_layers(module.model), *unused_modules(module.model).values()]
    groups = dict.fromkeys(layers, reshard_after_forward)
    last = _norm_and_head(module.model, layers)
    if last:
        groups[module.model.get_input_embeddings()] = False
    exact = MixedPrecisionPolicy(**{**dtypes, "param_dtype": None}, cast_forward_inputs=False)
    for router in routers_in_float32(module.model) if precision == "bf16" else []:
        fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for part, again in groups.items():
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes), reshard_after_forward=again)
    # The root's inputs are no activations: FSDP would find the floats in Batch and Plan and round lambdas, weights
    # and scales of the loss to bf16 (a lambda above 1 - 2^-9 to 1). The activations are bf16, as the parameters are.
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    if last:
        fully_shard(last, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        # Another pass, or another term of the loss, may need them after the backward of this pass.
        last[0].set_reshard_after_backward(False, recurse=False)
    # No head alone: a forward that does not read it would leave its weights of now for a later one.
    for one, following in pairwise([*decoder_layers(module.model), *last[:-1]]):
        one.set_modules_to_forward_prefetch([following])
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(module, "read")
    if check := fill(module.model):
        module.head = module.read(lambda it: check(it.model))
        reshard(module)
    return module


def _norm_and_head(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[Any]:
    """Return the head and what is in front of it, to be gathered in the last layer and reduced after the loss.

    Nothing, if the head has the weights of the embeddings. The loss reads the head's weight and never calls the head:
    it is gathered with the module in front of it, which runs, or when it is read.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not {*embeddings.parameters()}.isdisjoint(head.parameters()):
        return []
    own = [one for one in model.get_decoder().children() if {embeddings, *layers}.isdisjoint(one.modules())]
    # Llama: norm; GPT-2: ln_f, beside the positions wpe; Bloom has a norm behind the embeddings as well.
    norms = [one for one in own if [*one.parameters()] and not isinstance(one, nn.Embedding)]
    return [*norms, head] if len(norms) == 1 else [head]


def shards_of(options: TrainingOptions, world: World) -> int:
    """Return how many ranks share one copy of the weights."""
    parallel = resolve_parallel(options.parallel, world)
    if parallel == "hsdp":
        return shard_group(options.shard_group_size, world)
    return world.size if parallel == "fsdp" else 1


def shard_group(shard_group_size: int | None, world: World) -> int:
    """Return how many ranks share one copy of the weights under hsdp; ConfigError if it does not divide all."""
    group = shard_group_size or world.local_size
    if world.size % group:
        raise ConfigError(
            f"training.shard_group_size is {group}, which does not divide the {world.size} ranks; allowed: a divisor "
            f"of {world.size}, or null, which means the ranks of a node"
        )
    return group


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError if torch.compile has no compiler to use, before anything is read."""
    from torch._inductor import cpp_builder, exc

    try:
        if device.type != "cpu":
            import triton  # noqa: F401
        else:
            cpp_builder.get_cpp_compiler()
    except (ImportError, exc.InvalidCxxCompiler) as error:
        raise ConfigError(
            "training.compile true needs a C++ compiler on a CPU (install g++, or name another one in the variable "
            "CXX) and the package triton on a GPU (pip install triton); or leave training.compile out"
        ) from error
