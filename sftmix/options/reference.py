"""The reference model: its training inherits the target's options."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sftmix.common.plain import PlainFields
from sftmix.options.model import LoraOptions, ModelOptions
from sftmix.options.training import OF_SHARDS, Parallel, Precision, ScheduleName, TrainingOptions


@dataclass(kw_only=True)
class ReferenceModel(PlainFields):
    """Another reference model (section 5.1: a weaker one), with its own tokenizer, template and length."""

    path: str = ""
    """Hub id or directory; empty: the target's own base model."""
    template: str | None = None
    """As data.template, for the reference's tokenizer. null: the run's template if that is the target's tokenizer
    (padding aside); else the tokenizer's own, or alpaca if it has none."""
    max_length: int | None = None
    """As data.max_length, for the reference. null: the run's length, or the model's context if that is shorter, if it
    has the target's tokenizer; else the smaller of 2048 and the model's context."""
    lora: LoraOptions | None = None
    """Adapters of the reference. null: the target's (model.lora) if reference.model.path is empty, else none; r 0
    trains all weights."""


@dataclass(kw_only=True)
class ReferenceTraining(PlainFields):
    """Training options of the reference; null inherits the same option of `training`."""

    global_batch_size: int | None = None
    """Examples per optimizer step."""
    micro_batch_size: int | None = None
    """Examples per forward and backward on one rank. Replaces an inherited training.micro_batch_tokens."""
    micro_batch_tokens: int | Literal["auto"] | None = None
    """Token slots per forward and backward on one rank. Replaces an inherited training.micro_batch_size."""
    learning_rate: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """AdamW weight decay on matrices."""
    betas: tuple[float, float] | None = None
    """AdamW betas."""
    eps: float | None = None
    """AdamW epsilon."""
    schedule: ScheduleName | None = None
    """Learning rate after the warm-up."""
    warmup_ratio: float | None = None
    """Share of the steps with a linearly rising learning rate."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this global norm."""
    epochs: float | None = None
    """Passes over the training rows. Replaces an inherited training.max_steps."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; decides if epochs are also set."""
    precision: Precision | None = None
    """Precision of the computation."""
    parallel: Parallel | None = None
    """Division of work between ranks. Replaces inherited options that it does not have: training.shard_group_size
    (hsdp), training.reshard_after_forward and training.reduce_each_micro_batch (fsdp and hsdp)."""
    shard_group_size: int | None = None
    """hsdp only: ranks that share one copy of the weights."""
    reshard_after_forward: bool | None = None
    """fsdp and hsdp: free the weights of a decoder layer after its forward."""
    reduce_each_micro_batch: bool | None = None
    """fsdp and hsdp: reduce gradients to shards after each micro-batch."""
    activation_checkpointing: bool | Literal["auto"] | None = None
    """Recompute each decoder layer in the backward."""
    compile: bool | Literal["auto"] | None = None
    """Compile each decoder layer."""
    length_groups: int | None = None
    """Groups of similar length into which a micro-batch is padded. Replaces an inherited training.padding_free true."""
    padding_free: bool | Literal["auto"] | None = None
    """true: the examples of a micro-batch share one row without padding. Replaces an inherited
    training.length_groups."""
    chunk_size: int | None = None
    """Token rows of logits alive at once in the loss."""
    seed: int | None = None
    """Seed of the reference's order; null: the run's seed (with random streams of its own)."""


INSTEAD_OF = {"epochs": "max_steps", "micro_batch_size": "micro_batch_tokens", "micro_batch_tokens": "micro_batch_size"}
"""Options of the reference, each with the one that it then does not inherit."""


def reference_lora(target: ModelOptions, reference: object) -> LoraOptions:
    """Return the adapters of a reference model: its own, or the target's if both have the same base model, or none."""
    if not isinstance(reference, ReferenceModel):  # null: the target's base model
        return target.lora
    if reference.lora is not None:
        return reference.lora
    return LoraOptions() if reference.path else target.lora


def inherit(training: TrainingOptions, reference: ReferenceTraining | None) -> TrainingOptions:
    """Return the run's training options, replaced by those that the reference sets itself.

    If two options exclude each other and the reference sets one, the other is not inherited: a reference cannot
    put it aside itself, since its null inherits.
    """
    own = asdict(reference or ReferenceTraining())
    chosen = {name: value for name, value in own.items() if value is not None and name != "seed"}
    aside: dict[str, Any] = {other: None for name, other in INSTEAD_OF.items() if name in chosen}
    if "length_groups" in chosen and training.padding_free is True:
        aside["padding_free"] = "auto"
    if chosen.get("padding_free") is True:
        aside["length_groups"] = None
    aside |= {name: default for name, default, of in OF_SHARDS if chosen.get("parallel", "hsdp") not in of}
    return replace(training, **aside | chosen)
