"""Training and its checkpoints."""

from dataclasses import dataclass
from typing import Literal

from sftmix.common.plain import PlainFields

ScheduleName = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

SHARDED = ("fsdp", "hsdp")
"""The values of training.parallel under which ranks share the weights."""

DEFAULT_MICRO_BATCH = 8
"""Examples per forward and backward on one rank, if neither their number nor the number of their tokens is limited."""


LAYOUT = (
    "micro_batch_size",
    "micro_batch_tokens",
    "length_groups",
    "padding_free",
    "parallel",
    "shard_group_size",
    "activation_checkpointing",
    "compile",
    "chunk_size",
)
"""Training options that change the order of sums, and no result but for rounding; with dropout, also its masks."""


@dataclass(kw_only=True)
class TrainingOptions(PlainFields):
    global_batch_size: int = 32
    """Examples per optimizer step, over all ranks and accumulation steps; an even number when examples are paired."""
    micro_batch_size: int | None = None
    """Examples per forward and backward on one rank, at most; an even number when examples are paired. null: 8, or
    as many as training.micro_batch_tokens allows. Excludes it."""
    micro_batch_tokens: int | None = None
    """Token slots per forward and backward on one rank, at most, padding included: as many examples as fit. A pair, or
    an example, that needs more gets a micro-batch of its own. Excludes training.micro_batch_size."""
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
    """Stop after this many optimizer steps; the schedule has the same length. null: training.epochs decides."""
    precision: Precision = "auto"
    """bf16: autocast (FSDP: bf16 parameters in compute), weights and optimizer stay float32. auto: bf16 on a GPU
    that has it, else fp32."""
    parallel: Parallel = "auto"
    """Division of work between ranks under torchrun. fsdp: all ranks share one copy of the weights; hsdp: each group of
    shard_group_size ranks has one. auto: ddp on CPU, fsdp on several GPUs."""
    shard_group_size: int | None = None
    """hsdp only: ranks that share one copy of the weights, a divisor of their number. null: the ranks of a node."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute each decoder layer in the backward: less memory, about a third more compute. auto: on a GPU if the
    micro-batch that is asked for, or a pair of the longest rows, does not fit without that."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each decoder layer (torch.compile): minutes at the start, fewer kernels after that; results differ in
    rounding. Needs a C++ compiler on a CPU, Triton on a GPU. auto: on CUDA for more than two minutes of training, if a
    layer becomes one graph."""
    length_groups: int | None = None
    """Groups of similar length into which a micro-batch is padded; pairs stay random. null: one per two examples,
    at most 16, on CPU, one on a GPU. Excludes padding_free true."""
    padding_free: bool | Literal["auto"] = "auto"
    """true: the examples of a micro-batch share one row without padding, kept apart by their positions; a model that
    mixes them is refused. auto: true on a GPU with model.attention flash_attention_2, flash_attention_3 or
    flex_attention, which do no work between examples."""
    chunk_size: int | None = None
    """Token rows of logits alive at once in the loss; null: chosen from the vocabulary."""
    timeout: float = 1800.0
    """Seconds that ranks wait for one that hangs before the run ends, under torchrun. The first rank reads the rows and
    writes the model while the others wait, so it must be longer than that takes."""

    @property
    def most_examples(self) -> int | None:
        """Most examples of a micro-batch; None: only its tokens are limited."""
        if self.micro_batch_size is None and self.micro_batch_tokens is None:
            return DEFAULT_MICRO_BATCH
        return self.micro_batch_size


@dataclass(kw_only=True)
class CheckpointOptions(PlainFields):
    every: int | None = None
    """Optimizer steps between checkpoints; null: ten per stage, at least 50 steps apart. 0: none."""
    keep: int = 2
    """Number of checkpoints kept for each stage, at least 1."""
    keep_best: bool = False
    """Also keep the weights of the best held-out evaluation in training, for `export --best`."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How float32 weights are rounded for an export in half precision (model.dtype). stochastic: to one of the two
    neighbours, by the seed, the nearer one more often, which keeps steps too small for nearest."""
