"""Training and its checkpoints.

An option may be in other lists as well: LAYOUT and OF_SHARDS here, INSTEAD_OF in `sftmix.options.reference`, its
range in `sftmix.config.checks`, and, if it may be auto, DECIDED or WRAPPED in `sftmix.training.machine`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sftmix.words.given import OptionFields

ScheduleName = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

SHARDED = ("fsdp", "hsdp")
"""The values of training.parallel under which ranks share the weights."""

OF_SHARDS: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...] = (
    ("shard_group_size", (None,), ("hsdp",)),
    ("reshard_after_forward", ("auto", True), SHARDED),
    ("reduce_each_micro_batch", ("auto", False), SHARDED),
    ("reduce_dtype", ("float32",), SHARDED),
)
"""Training options that only some values of training.parallel have: the name; the values that are allowed with any
value of parallel, the default first; the values of parallel that allow all."""

DEFAULT_MICRO_BATCH = 8
"""Examples per forward and backward on one CPU rank, if the options limit neither their number nor their tokens."""


LAYOUT = (
    "micro_batch_size",
    "micro_batch_tokens",
    "length_groups",
    "padding_free",
    "parallel",
    "shard_group_size",
    "reshard_after_forward",
    "reduce_each_micro_batch",
    "activation_checkpointing",
    "compile",
    "chunk_size",
    "deterministic",
    "flash_kernels",
)
"""Training options that change the order of sums, and no result but for rounding; with dropout, also its masks."""


@dataclass(kw_only=True)
class StageTraining(OptionFields):
    """Training options that a reference may have of its own."""

    global_batch_size: int = 32
    """Examples per optimizer step, over all ranks and accumulation steps; even if examples are paired."""
    micro_batch_size: int | None = None
    """Most examples per forward and backward on one rank; even if examples are paired. null: as many as
    training.micro_batch_tokens allows, on a CPU 8. Excludes training.micro_batch_tokens."""
    micro_batch_tokens: int | Literal["auto"] | None = None
    """Most token slots per forward and backward on one rank, padding included. A pair that needs more gets a
    micro-batch of its own. auto: what memory allows, decided before the first step. null: auto on a GPU. Excludes
    training.micro_batch_size."""
    learning_rate: float = 2e-6
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """AdamW weight decay on matrices; biases and norms get none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps with a linearly rising learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 does not clip."""
    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps, and the length of the schedule. null: training.epochs decides."""
    precision: Precision = "auto"
    """bf16: autocast (FSDP: bf16 parameters in compute), trained weights and optimizer stay float32. auto: bf16 on a
    GPU that has it, else fp32."""
    parallel: Parallel = "auto"
    """Division of work under torchrun. fsdp: all ranks share one copy of the weights; hsdp: each group of
    shard_group_size ranks has one. auto: ddp on CPU; on several GPUs the cheapest that fits."""
    shard_group_size: int | None = None
    """hsdp only: ranks that share one copy of the weights, a divisor of their number. null: the ranks of a node."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """fsdp and hsdp: free the weights of a decoder layer after its forward, and gather them again for the backward.
    false: keep them. auto: the cheaper that fits, on several GPUs; else true."""
    reduce_each_micro_batch: bool | Literal["auto"] = "auto"
    """fsdp and hsdp: reduce gradients to shards after each micro-batch, not once a step: more traffic, 4 bytes less for
    each trained number. auto: the cheaper that fits, on several GPUs; else false."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """fsdp and hsdp: dtype in which gradients are added up over micro-batches and ranks. bfloat16 sends half as much;
    results differ as between fp32 and bf16."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute each decoder layer in the backward: less memory, about a third more compute. auto: on a GPU if the
    cheapest step that fits needs that."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each decoder layer (torch.compile); results differ in rounding. Needs a C++ compiler on a CPU, Triton on
    a GPU. auto: on CUDA if it saves more than the 20 s that it takes, by an H200's speeds, and a layer becomes one
    graph."""
    length_groups: int | None = None
    """Groups of similar length into which a micro-batch is padded; pairs stay random. null: one per two examples,
    at most 16, on CPU, one on a GPU. Excludes padding_free true."""
    padding_free: bool | Literal["auto"] = "auto"
    """true: the examples of a micro-batch share one row without padding, kept apart by their positions; a model that
    mixes them is refused. auto: true on a GPU with model.attention flash_attention_2 or flash_attention_3, and on CUDA
    with varlen."""


@dataclass(kw_only=True)
class TrainingOptions(StageTraining):
    """Training options of every stage, and those that all stages share."""

    deterministic: bool | Literal["auto"] = "auto"
    """true: torch's deterministic algorithms, so that a continued run has the same bits on a GPU as well; slower.
    auto: as torch is set, which is off."""
    flash_kernels: Literal["torch", "FA3"] = "torch"
    """FA3: FlashAttention 3 wherever torch's flash attention is taken, by torch's own switch, while a stage trains. It
    needs a Hopper GPU (sm90) and the package flash_attn_3. Not run by us."""
    chunk_size: int | None = None
    """Token rows of logits alive at once in the loss; null: chosen from the vocabulary."""
    timeout: float = 1800.0
    """Seconds that ranks wait for a rank that hangs, under torchrun; more than the first rank takes to read the rows or
    to write the model."""

    def limits(self, device: str) -> tuple[int | None, int | Literal["auto"] | None]:
        """Return the most examples and the most token slots of a micro-batch on this type of device; None: no limit."""
        if self.micro_batch_size is None and self.micro_batch_tokens is None:
            return (DEFAULT_MICRO_BATCH, None) if device == "cpu" else (None, "auto")
        return self.micro_batch_size, self.micro_batch_tokens


@dataclass(kw_only=True)
class CheckpointOptions(OptionFields):
    every: int | None = None
    """Optimizer steps between checkpoints; 0: none. null: by the clock, in 2% of the time, at least two minutes apart;
    and after each quarter of the stage, at least 20 steps apart. A signal and the end also save one."""
    every_seconds: float | None = None
    """Seconds between checkpoints. Excludes checkpoint.every."""
    keep: int = 2
    """Number of checkpoints kept for each stage, at least 1."""
    keep_best: bool = False
    """Also keep the weights of the best held-out evaluation in training, for `export --best`."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How float32 weights are rounded for an export in half precision (model.dtype). stochastic: to either neighbour,
    the nearer more often, which keeps steps too small for nearest."""
