"""Numbers of a model, FLOPs and traffic of a stage, against the real model, torch's counter, and real ranks."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, MambaConfig

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.model.adapters import add_adapters
from sftmix.model.layers import recompute_activations
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.tools.estimate.run import QUANTIZED_BYTES, FakeModel, _ranks, forward_flops, traffic, training_flops
from sftmix.tools.estimate.work import Work, layout_of
from sftmix.training.module import TrainingModule, gradient_sync
from sftmix.training.parallel import wrap
from sftmix.training.scoring import scoring_plan
from tests.distributed.test_sharding import COUNTED
from tests.tools.estimate.configs import LAYERS, VOCABULARY, WIDTH, machine, small_llama
from tests.toy import toy_rows

LORA, QLORA = LoraOptions(r=4), LoraOptions(r=4, quantize="4bit")
DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"), num_key_value_heads=2)


def test_numbers_are_those_of_the_real_model(path, tmp_path):
    real, fake = load_model(path), FakeModel(path, None, LoraOptions())
    assert fake.numbers == (sum(p.numel() for p in real.parameters()),) * 2
    assert fake.head.shape == real.get_output_embeddings().weight.shape
    assert fake.per_token.all == sum(p.numel() for x in real.model.layers for p in x.parameters() if p.dim() == 2)
    adapted = FakeModel(path, None, LoraOptions(r=4, target_modules=["q_proj"]))
    assert adapted.numbers.trained == LAYERS * 2 * 4 * WIDTH
    assert adapted.numbers.all == fake.numbers.all + adapted.numbers.trained
    assert not adapted.head.requires_grad
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=512).save_pretrained(tmp_path / "gpt2")
    gpt2 = FakeModel(tmp_path / "gpt2", None, LoraOptions())
    assert gpt2.per_token.all == 2 * 12 * 16 * 16  # 512 learned positions are looked up, not multiplied with
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50}
    MambaConfig(**sizes, architectures=["MambaForCausalLM"]).save_pretrained(tmp_path / "mamba")
    mamba = FakeModel(tmp_path / "mamba", None, LoraOptions())
    assert (mamba.attention_width, mamba.n_layers) == (0, 2)  # and not 4: each block has a mixer, which is none


def test_four_bit_layers_are_counted_as_bitsandbytes_stores_them(path):
    """Embeddings, head, norms and adapters stay float32 (bitsandbytes leaves them, load_model loads them so)."""
    real, fake = load_model(path), FakeModel(path, "sdpa", QLORA)
    add_adapters(real, LORA, seed=0)
    in_4_bits = sum(p.numel() for p in real.model.layers.parameters() if p.dim() == 2 and not p.requires_grad)
    others = sum(p.numel() for p in real.parameters()) - in_4_bits
    assert others > 2 * VOCABULARY * WIDTH
    assert fake.stored_bytes == 4 * others + QUANTIZED_BYTES * in_4_bits
    read = FakeModel(path, "sdpa", QLORA.without_adapters())
    assert read.stored_bytes == fake.stored_bytes - 4 * fake.numbers.trained


def test_flops_are_those_that_torch_counts(path):
    """torch counts whole attention matrices, of which a causal mask needs half; so the squares count twice here."""
    fake, real = FakeModel(path, "sdpa", LoraOptions()), load_model(path, attention="eager").eval()
    with FlopCounterMode(display=False) as forward:
        loss = real(input_ids=torch.ones(1, 24, dtype=torch.int64)).logits.sum()
    amount = np.array([24, 24, 2 * 24**2])
    assert sum(forward_flops(fake, amount)) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert training_flops(fake, amount, recompute=False) == both
    head = forward_flops(fake, amount)[2]
    assert training_flops(fake, amount, recompute=True) == both + forward.get_total_flops() - head


def test_hsdp_shares_within_a_node():
    def shards(count: int, group: int | None = None, per_node: int = 8) -> int:
        options = TrainingOptions(parallel="hsdp", shard_group_size=group)
        return layout_of(options, machine(gpus=count, gpus_per_node=per_node)).shards

    assert (shards(16), shards(4), shards(16, 2), shards(16, per_node=4)) == (8, 4, 2, 4)
    with pytest.raises(ConfigError, match="shard_group_size is 8, but there are 12 ranks"):
        shards(12)


# ------------------------------------------------------------------------------------------------ traffic


class Moved(TorchDispatchMode):
    """Bytes that this rank passes on in collectives of a ring; whole tensors are gathered, reduced or averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(COUNTED.values(), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = COUNTED.get(func.__name__.split(".")[0]) if func.namespace == "c10d" else None
        if name:
            whole = args[1] if name == "reduce_scatter" else args[0]
            size = sum(x.nbytes for x in ([whole] if isinstance(whole, torch.Tensor) else whole))
            self.bytes[name] += (1 + (name == "all_reduce")) * size / 2  # in groups of two ranks
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Way:
    """How ranks work together; so many micro-batches of so many segments make a step."""

    parallel: Any
    precision: Any = "fp32"
    segments: int = 1
    micro_batches: int = 2
    recompute: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)


WAYS = [
    (2, Way("fsdp", "bf16")),
    (2, Way("fsdp", segments=2)),
    (2, Way("fsdp", segments=2, micro_batches=1)),
    (2, Way("fsdp", segments=4, recompute=True)),
    (2, Way("fsdp", "bf16", lora=LoraOptions(r=2))),
    (4, Way("hsdp", "bf16")),
    (4, Way("hsdp", segments=2)),
]


def a_step(module: torch.nn.Module, way: Way) -> None:
    for number in range(way.micro_batches):
        given = collate([(Slot(k),) for k in range(4)], DATA, n_segments=way.segments)
        plan = scoring_plan(given)
        plan.row_weight.fill_(1.0)
        with gradient_sync(module, number == way.micro_batches - 1):
            module(given, plan).loss.backward()
    module.zero_grad(set_to_none=True)


def sent(path: str, ranks: int, way: Way) -> tuple[float, float]:
    options = TrainingOptions(parallel=way.parallel, precision=way.precision, shard_group_size=2)
    counts = {"micro_batches": way.micro_batches, "passes": way.micro_batches * way.segments}
    work, layout = (
        Work("train", path, way.lora, options, np.zeros(3), **counts),
        layout_of(options, machine(gpus=ranks)),
    )
    return traffic(work, FakeModel(path, None, way.lora), layout)


@pytest.mark.parametrize(("ranks", "way"), WAYS)
def test_what_is_sent_is_what_a_rank_sends(path, ranks, way):
    """In the second step, of bytes of weights and of gradients; the other ranks are not there."""
    model, world = load_model(path), World(size=ranks)
    if way.lora.r:
        add_adapters(model, way.lora, seed=0)
    if way.recompute:
        recompute_activations(model)
    wrapping = {"parallel": way.parallel, "precision": way.precision}
    with _ranks(world):
        module = wrap(TrainingModule(model), world=world, shard_group_size=2, **wrapping)
        a_step(module, way)
        with Moved() as moved:
            a_step(module, way)
    assert bool(moved.bytes["all_reduce"]) == (way.parallel == "hsdp")
    weights, gradients = sent(path, ranks, way)
    assert moved.bytes["all_gather"] == pytest.approx(weights, rel=1e-6)
    assert moved.bytes["reduce_scatter"] + moved.bytes["all_reduce"] == pytest.approx(gradients, rel=1e-6)


def test_ddp_averages_all_gradients_around_the_ring(path):
    numbers = FakeModel(path, None, LoraOptions()).numbers.all
    assert [sent(path, n, Way("ddp", segments=2)) for n in (2, 4)] == [(0, 4 * numbers), (0, 6 * numbers)]
