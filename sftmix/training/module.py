"""Model and losses in one forward, in the module that DDP and FSDP wrap; and the wrapping: `training_module`.

Using the LM head outside the wrapped forward would skip DDP's hooks and see sharded weights under FSDP. DDP and FSDP2
both average gradients over ranks, so the step multiplies its sums by the world size and divides by counts reduced over
all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sftmix.common.errors import ConfigError
from sftmix.common.launcher import needs_torchrun
from sftmix.common.world import World
from sftmix.components.view import LossView
from sftmix.functional import SFTLoss
from sftmix.model.head import head_of
from sftmix.model.layers import decoder_layers, recompute_activations, unused_modules
from sftmix.model.meta import Values
from sftmix.model.packing import check_attention, is_flash, is_skipping, known_rows, packing_problem
from sftmix.options import TrainingOptions
from sftmix.types import Batch, Plan, Segment

Perturb = Callable[..., torch.Tensor]
"""`Perturbation.embeddings` with seed and step filled in: (e, mask, ids=...) -> e."""
RECOMPILE_LIMIT = 32
"""Largest number of compiled variants of a layer: with and without mask, gradients, one example or several, ..."""


class TrainingModule(nn.Module):
    """A causal language model whose forward returns the fused NTP + Mixup loss of one micro-batch.

    padding_free  True if the examples of a micro-batch stand in one row; before it is set to True,
                  `sftmix.model.packing.packing_problem` must have found no problem
    """

    def __init__(self, model: PreTrainedModel, *, chunk_size: int | None = None) -> None:
        super().__init__()
        self.padding_free = False
        self.model = model
        self.head = head_of(model)
        self.chunk_size = chunk_size

    def hidden_states(self, batch: Batch, perturb: Perturb | None = None) -> torch.Tensor:
        """Return hidden[T, D], the input of the LM head at the positions that predict the response tokens."""
        decoder = self.model.get_decoder()
        parts, order, flash = [], [], is_flash(self.model.config._attn_implementation)
        for segment in batch.segments:
            changing: Any = contextlib.nullcontext()
            if perturb is not None and segment.slots:  # not an idle segment
                # The decoder still gets the ids, as some have more embeddings by layer.
                ids = [batch.ids[slot] for slot in segment.slots]
                change = partial(_perturbed, segment, partial(perturb, ids=ids))
                changing = self.model.get_input_embeddings().register_forward_hook(change)
            with changing, known_rows(packed=segment.position_ids is not None):
                inputs = attention_inputs(segment, masked=segment.input_ids.is_cpu, flash=flash)
                out = decoder(input_ids=segment.input_ids, **inputs, use_cache=False)
            parts.append(out.last_hidden_state.flatten(0, 1).index_select(0, segment.index))
            order.append(segment.order)
        return torch.cat(parts).index_select(0, torch.argsort(torch.cat(order)))

    def forward(
        self,
        batch: Batch,
        plan: Plan,
        *,
        stats: bool = False,
        perturb: Perturb | None = None,
        loss: Callable[[LossView, Batch, Plan], SFTLoss] | None = None,
    ) -> SFTLoss:
        """Return the loss of `plan`, whose weights are already divided by the global counts.

        stats    also count correct tokens and compute the entropy
        perturb  a training step's change of the input embeddings; None in scoring
        loss     `Objective.loss`; None: the fused loss, as in scoring
        """
        view = ModelView(self, lambda: self.hidden_states(batch, perturb))
        return view.sft_loss(batch, plan, stats=stats) if loss is None else loss(view, batch, plan)

    def read(self, function: Callable[[TrainingModule], Any]) -> Any:
        """Return `function(module)`; `wrap` makes this call a forward for FSDP, too, so it sees whole weights."""
        return function(self)


class ModelView(LossView):
    """A view for one micro-batch in training; see `LossView`."""

    def __init__(self, module: TrainingModule, hidden: Callable[[], torch.Tensor]) -> None:
        super().__init__(module.head, hidden, chunk_size=module.chunk_size)
        self._model = module.model

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._model.get_input_embeddings()(input_ids)

    def states(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        *,
        layer: int = 0,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        mask, positions = mask.long(), mask.cumsum(1).sub(1).clamp(min=0)
        changing: Any = contextlib.nullcontext()
        if change is not None and layer == 0:
            embeddings = change(embeddings)
        elif change is not None:
            layers = decoder_layers(self._model)
            if not 1 <= layer <= len(layers):
                raise ConfigError(f"no decoder layer {layer}; allowed: 1 to {len(layers)}, and 0, the embeddings")
            # Where activations are recomputed, the backward would make the layer's forward without the hook.
            if any(getattr(part, "gradient_checkpointing", False) for part in self._model.modules()):
                raise ConfigError(
                    f"training.activation_checkpointing true and a change of the states after layer {layer} exclude "
                    "each other; leave it out, or change the embeddings (layer 0)"
                )

            def changed(module, inputs, output):
                if isinstance(output, tuple):  # of which some versions of transformers return the states first
                    return (change(output[0]), *output[1:])
                return change(output)

            changing = layers[layer - 1].register_forward_hook(changed)
        with changing, known_rows(packed=False):
            out = self._model.get_decoder()(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
            )
        return out.last_hidden_state


def _perturbed(segment: Segment, perturb: Perturb, module: nn.Module, inputs: object, e: torch.Tensor) -> torch.Tensor:
    """Return the changed embeddings of a segment; examples that share a row are perturbed as padded ones."""
    if segment.lengths is None:
        return perturb(e, segment.attention_mask)
    padded, mask = (
        pad_sequence(line[0].split(segment.lengths), batch_first=True) for line in (e, segment.attention_mask)
    )
    lines = zip(perturb(padded, mask), segment.lengths, strict=True)
    return torch.cat([line[:length] for line, length in lines])[None]


def attention_inputs(segment: Segment, *, masked: bool = True, flash: bool = False) -> dict[str, Any]:
    """Return the backbone inputs that say who attends to whom: the mask of real tokens, or packed positions.

    transformers keeps documents apart by their positions only if it gets no mask.

    masked  False leaves out the mask, with which transformers takes slower kernels: padding is on the right, where no
            causal token looks
    flash   add the places of the documents, which flash attention would else read from the device in each layer
    """
    if segment.position_ids is None:
        return {"attention_mask": segment.attention_mask if masked and segment.padded else None}
    inputs: dict[str, Any] = {"attention_mask": None, "position_ids": segment.position_ids}
    if flash and segment.starts is not None:
        longest = max(segment.lengths or (segment.input_ids.shape[1],))
        inputs |= {"cu_seq_lens_q": segment.starts, "cu_seq_lens_k": segment.starts}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    return inputs


def unwrap(wrapped: Any) -> TrainingModule:
    """Return the module inside DDP; FSDP2 changes the module in place, so there it is the module itself."""
    return wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped


def gradient_sync(wrapped: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Reduce gradients over ranks only if `enabled` (the last micro-batch of a step).

    Use it around forward and backward: around the backward alone it would do nothing under DDP.
    """
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not enabled:
        return wrapped.no_sync()
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
    return contextlib.nullcontext()


def autocast(wrapped: nn.Module, precision: str, device: torch.device) -> torch.autocast:
    """Return bf16 autocast; it is off under FSDP, whose policy already computes in bf16."""
    enabled = precision == "bf16" and not isinstance(wrapped, FSDPModule)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


# ----------------------------------------------------------------------------------------------------- wrapped module


def training_module(
    model: PreTrainedModel,
    options: TrainingOptions,
    *,
    precision: str,
    world: World,
    packed: bool = False,
    trains: bool = False,
    values: Values | None = None,
) -> nn.Module:
    """Return the wrapped module that trains or scores the model; it keeps the examples of one row apart.

    packed  some examples hold several documents
    trains  gradients are wanted
    values  the values of a model on the meta device
    Raises ConfigError if the attention cannot do this on the device.
    """
    check_attention(model, world.device, trains=trains)
    if trains and options.activation_checkpointing:
        recompute_activations(model)
    if trains and options.compile:
        # Layers by themselves share the compiled code, and names stay; lengths differ from batch to batch.
        from torch._dynamo import config  # takes a second to import

        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    parallel = resolve_parallel(options.parallel, world)
    if not trains:  # no buckets for gradients, and no copies of weights that autocast keeps for a backward
        model.requires_grad_(False)
        parallel = "none" if parallel == "ddp" else parallel
    target = TrainingModule(model, chunk_size=options.chunk_size)
    module = wrap(
        target,
        parallel=parallel,
        precision=precision,
        world=world,
        shard_group_size=options.shard_group_size,
        values=values,
    )

    # The examples of a micro-batch share a row as asked, or (auto) if the attention then skips work.
    auto, one_row = options.padding_free == "auto", options.padding_free is True
    if auto and options.length_groups is None:
        one_row = is_skipping(model.config._attn_implementation, world.device)
    if one_row or packed:
        with autocast(module, precision, world.device):
            problem = target.read(lambda it: packing_problem(it.model, padding_free=one_row))
        if isinstance(module, FSDPModule):
            module.reshard()  # undo the gathering of the probe: the optimizer is made of shards
        if problem is not None:
            if packed or not auto:
                raise ConfigError(problem)
            one_row = False
            if world.is_main:
                print(f"micro-batches are padded, as training.padding_free is auto: {problem}", flush=True)
    target.padding_free = one_row
    return module


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


# ----------------------------------------------------------------------------------------------------------- wrapping


def wrap(
    module: TrainingModule,
    *,
    parallel: str,
    precision: str,
    world: World,
    shard_group_size: int | None = None,
    values: Values | None = None,
) -> nn.Module:
    """Wrap the module, whose forward runs backbone, head and losses.

    fsdp: all ranks share one copy of the weights; hsdp: each group of neighbouring ranks does. They are gathered in one
    group per decoder layer and one for the rest (embeddings, norm, head), which is gathered once per forward and kept
    until the backward is done, so tied weights live in one group. What no forward runs has groups of its own, which are
    never gathered. Each group moves to the device when it is sharded. For a model on the meta device, `values` go into
    the shards: no rank holds the whole model.
    """
    if parallel == "none":
        return module.to(world.device)
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(module.to(world.device), gradient_as_bucket_view=True)
    if not dist.is_initialized():
        raise ConfigError(needs_torchrun(parallel))
    if parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
    else:
        group = shard_group(shard_group_size, world)
        mesh = init_device_mesh(world.device.type, (world.size // group, group), mesh_dim_names=("replicate", "shard"))
        # Its groups would have torch's own timeout, whatever training.timeout says.
        timeout = _get_default_group()._get_backend(world.device).options._timeout
        for ranks in mesh.get_all_groups():
            _set_pg_timeout(timeout, ranks)
    dtypes: Any = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16" else {}
    for layer in [*decoder_layers(module.model), *unused_modules(module.model).values()]:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes))
    # The root's inputs are no activations: FSDP would find the floats in Batch and Plan and round lambdas, weights
    # and scales of the loss to bf16 (a lambda above 1 - 2^-9 to 1). The activations are bf16, as the parameters are.
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    sharded = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(module, "read")
    if values is not None:
        values.fill(module.model)
        checks = values.checks
        for head in module.read(lambda it: [check(it.model) for check in checks]):
            module.head = head
        sharded.reshard()  # the optimizer is made of the shards
    return module


def shard_group(shard_group_size: int | None, world: World) -> int:
    """Return how many ranks share one copy of the weights under hsdp; ConfigError if it does not divide all."""
    group = shard_group_size or world.local_size
    if world.size % group:
        raise ConfigError(
            f"training.shard_group_size is {group}, which does not divide the {world.size} ranks; allowed: a divisor "
            f"of {world.size}, or null, which means the ranks of a node"
        )
    return group


# ------------------------------------------------------------------------------------------------------------- layers


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
