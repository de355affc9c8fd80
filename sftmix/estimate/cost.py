"""FLOPs and memory of one stage.

FLOPs count multiplications and additions of matrices: 2 per number and token forward, twice that backward (once where
the matrix is frozen), attention as causal, the head on response tokens only. Mixup adds no matrix product.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sftmix._fused import BLOCK_CELLS, default_chunk_size
from sftmix.estimate.machine import Machine
from sftmix.estimate.model import FakeModel
from sftmix.estimate.work import Tokens, Work
from sftmix.options import SHARDED, TrainingOptions
from sftmix.training.distributed import World, resolve_parallel

FLOAT, HALF = 4, 2


def forward_flops(model: FakeModel, tokens: Tokens) -> float:
    """Of a forward pass over the tokens."""
    vocabulary, width = model.head_shape
    return 2.0 * (model.per_token() * tokens.all + vocabulary * width * tokens.targets) + _attention(model, tokens)


def training_flops(model: FakeModel, tokens: Tokens, *, recompute: bool) -> float:
    """Of forward and backward; with activation checkpointing the backbone's forward counts twice."""
    vocabulary, width = model.head_shape
    backbone = 2.0 * model.per_token() * tokens.all + _attention(model, tokens)
    head = 2.0 * vocabulary * width * tokens.targets
    weights = 2.0 * model.per_token(trained=True) * tokens.all + head * model.head_is_trained
    inputs = backbone + _attention(model, tokens) + head
    return backbone * (2 if recompute else 1) + head + inputs + weights


def _attention(model: FakeModel, tokens: Tokens) -> float:
    """Scores and values, each 2 FLOPs per head number and pair of positions, of which a causal mask leaves half."""
    return 2.0 * model.attention_width * len(model.layers) * tokens.squares


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the peak of training; the parts add up to `peak`.

    process      what the interpreter and its libraries hold before there is a model (host memory, CPU only)
    weights      float32 (their shard under FSDP; a 4-bit base as it is)
    optimizer    two moments of what is trained
    gradients    of what is trained
    activations  what autograd keeps of the largest micro-batch
    loss         logits of a chunk and the gradients of head and hidden states
    working      gathered layers, what the backward of a layer makes, temporaries of the optimizer's step
    """

    process: float
    weights: float
    optimizer: float
    gradients: float
    activations: float
    loss: float
    working: float

    @property
    def peak(self) -> float:
        return sum(asdict(self).values())


def training_memory(model: FakeModel, work: Work, machine: Machine, *, process: float) -> Memory:
    """The largest of three moments: the fused loss, the end of the backward, the optimizer's step."""
    assert work.options is not None
    assert work.batch is not None
    options, batch = work.options, work.batch
    bf16 = is_bf16(options, machine)
    parallel = resolve_parallel(options.parallel, World(size=machine.count, device=machine.device))
    shards = (options.shard_group_size or machine.count) if parallel in SHARDED else 1
    weights, trained = model.stored_bytes / shards, FLOAT * model.trained / shards
    fixed = {"process": process, "weights": weights, "optimizer": 2 * trained}
    traced = model.saved(batch.segments, bf16=bf16, recompute=options.activation_checkpointing)
    copies = _gathered(model, parallel, bf16) + model.saved_by_a_layer(batch.segments, bf16=bf16)
    step = 2 * FLOAT * model.largest_tensor if machine.is_cpu else trained
    loss = _loss(model, batch.targets, options, machine, bf16)
    before = trained if batch.accumulated else 0.0
    tied = FLOAT * model.head.weight.numel() * (model.is_tied and model.head_is_trained)
    moments = [
        Memory(**fixed, gradients=before, activations=traced, loss=loss, working=copies),
        Memory(**fixed, gradients=trained, activations=0.0, loss=0.0, working=copies + tied),
        Memory(**fixed, gradients=trained, activations=0.0, loss=0.0, working=step),
    ]
    return max(moments, key=lambda moment: moment.peak)


def reading_memory(model: FakeModel, *, process: float) -> Memory:
    """Of a stage that only scores: the weights."""
    return Memory(process, model.stored_bytes, 0.0, 0.0, 0.0, 0.0, 0.0)


def is_bf16(options: TrainingOptions, machine: Machine) -> bool:
    return options.precision == "bf16" or (options.precision == "auto" and not machine.is_cpu)


def _gathered(model: FakeModel, parallel: str, bf16: bool) -> float:
    """FSDP: two gathered layers (one computes, one comes) and what lies outside the layers, with its gradient. Autocast
    keeps a copy of each matrix, which the traced activations count; DDP's gradients are views of its buckets."""
    if parallel not in SHARDED:
        return 0.0
    size = HALF if bf16 else FLOAT
    return size * (2 * model.largest_layer + model.outside_layers) + FLOAT * model.largest_layer


def _loss(model: FakeModel, targets: int, options: TrainingOptions, machine: Machine, bf16: bool) -> float:
    """Bytes of the fused loss inside its forward, where it needs the most."""
    vocabulary, width = model.head_shape
    size = HALF if bf16 else FLOAT
    chunk = min(targets, options.chunk_size or default_chunk_size(vocabulary, machine.device))
    block = min(chunk, max(1, BLOCK_CELLS[machine.is_cpu] // vocabulary)) * vocabulary * FLOAT
    gradients = FLOAT * vocabulary * width * model.head_is_trained + 2 * FLOAT * targets * width
    return gradients + size * chunk * vocabulary + block * (3 if bf16 else 1) + HALF * vocabulary * width * bf16
