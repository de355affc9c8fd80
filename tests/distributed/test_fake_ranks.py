"""Ranks that are not there: wrapping, steps and checkpoint plans of many ranks in one process, on torch's fake process
group, with the widths and vocabularies of the recipes' models and two of their layers. Plans, and no values."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from sftmix.components import NTP, AdamW, SFTMix
from sftmix.model.adapters import add_adapters
from sftmix.model.head import head_of
from sftmix.model.mapped import empty_model
from sftmix.model.meta import carry
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import tensors_of
from sftmix.training.parallel import training_module
from sftmix.training.step import PreparedStep, plans_of, train_step
from sftmix.training.update import build_optimizer
from tests.tools.estimate.configs import micro_batch
from tests.toy import Answers, FakeRank, toy_model, toy_setup

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2}
SHAPES: dict[str, Any] = {
    "llama-8b": LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, **LLAMA),
    "llama-1b-tied": LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, tie_word_embeddings=True, **LLAMA
    ),
    "mistral-7b": MistralConfig(vocab_size=32_768, hidden_size=4096, intermediate_size=14_336, **LLAMA),
    "qwen-14b": Qwen2Config(
        vocab_size=152_064, hidden_size=5120, intermediate_size=13_824, **(LLAMA | {"num_attention_heads": 40})
    ),
}


@dataclass(frozen=True)
class Way:
    shape: str
    ranks: int
    parallel: Any = "fsdp"
    precision: Any = "bf16"
    lora: int = 0
    recompute: bool = False

    @property
    def rank(self) -> int:
        """One for each number of ranks: torch keeps meshes, and with them this rank's place, by the ranks in them."""
        return {8: 7, 64: 9}[self.ranks]


WAYS = [
    Way("llama-8b", 8),
    Way("llama-8b", 64, recompute=True),
    Way("llama-8b", 64, "hsdp"),
    Way("llama-8b", 64, "hsdp", lora=16),
    Way("llama-1b-tied", 8),
    Way("llama-1b-tied", 64, "hsdp", "fp32"),
    Way("mistral-7b", 8, precision="fp32"),
    Way("mistral-7b", 64, lora=16),
    Way("qwen-14b", 64),
]


@contextmanager
def ranks(rank: int, size: int) -> Iterator[World]:
    options = FakeProcessGroup.Options()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size, pg_options=options)
    try:
        yield World(rank, size, local_size=min(size, 8))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def built(tmp_path, request):
    """A wrapped model on the meta device, with its rank among those that are not there."""
    way: Way = request.param
    config = SHAPES[way.shape]
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    model = empty_model(tmp_path)
    if way.lora:
        add_adapters(model, LoraOptions(r=way.lora), seed=0)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    options = TrainingOptions(
        parallel=way.parallel, precision=way.precision, activation_checkpointing=way.recompute, padding_free=False
    )
    with ranks(way.rank, way.ranks) as world:
        module = training_module(model, options, precision=way.precision, world=world, trains=True)
        yield way, options, world, shapes, module


every_way = pytest.mark.parametrize("built", WAYS, indirect=True, ids=str)


@every_way
@pytest.mark.filterwarnings("ignore:Set timeout")
def test_each_rank_has_its_part_of_every_weight(built):
    way, _, _, shapes, module = built
    per_copy = 8 if way.parallel == "hsdp" else way.ranks
    placements = (Replicate(), Shard(0)) if way.parallel == "hsdp" else (Shard(0),)
    parameters = dict(module.model.named_parameters())
    assert {name: p.shape for name, p in parameters.items()} == shapes
    for name, p in parameters.items():
        assert isinstance(p, DTensor), name
        assert (p.placements, p.device_mesh.size()) == (placements, way.ranks)
        rows = math.ceil(p.shape[0] / per_copy)  # torch.chunk's
        first = min(p.shape[0], rows * (way.rank % per_copy))
        assert p.to_local().shape == (min(rows, p.shape[0] - first), *p.shape[1:])


@every_way
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Set timeout")
@pytest.mark.parametrize("objective", [NTP(), SFTMix()], ids=["NTP", "SFTMix"])
def test_a_step_trains_every_part_and_plans_to_save_it(built, objective):
    _, options, world, _, module = built
    world, given = FakeRank(world.rank, world.size, local_size=world.local_size), micro_batch(2, 33)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        optimizer = build_optimizer(module.to_empty(device="cpu"), options, AdamW())
    about = {"options": options, "precision": options.precision, "world": world}
    setup = toy_setup(module, optimizer=optimizer, objective=objective, **about)
    plans, problem = plans_of(setup, [given] * 2, 0)
    with fake, Answers():
        assert train_step(setup, PreparedStep(0, [given] * 2, plans, problem)).updates
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert set(optimizer.state) == set(trained.values())
    for p in trained.values():
        state = optimizer.state[p]["exp_avg"]
        assert (state.placements, state.to_local().shape) == (p.placements, p.to_local().shape)
        assert (p.dtype, state.dtype) == (torch.float32, torch.float32)

    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors_of(module, optimizer)[0], is_coordinator=True)
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
    own = {item.index.fqn: tuple(item.tensor_data.chunk.sizes) for item in plan.items if item.tensor_data}
    for name, p in trained.items():
        for stored in (f"weights/{name}", *(f"optimizer/state.{name}.{kind}" for kind in ("exp_avg", "exp_avg_sq"))):
            assert metadata.state_dict_metadata[stored].size == p.shape
            assert own.get(stored, p.to_local().shape) == p.to_local().shape  # some ranks have no row of a small one
    assert {name for name in metadata.state_dict_metadata if name.startswith("weights/")} == {
        f"weights/{name}" for name in trained
    }


# ------------------------------------------------------------------------- with values, each rank in a process


def loaded(given: tuple[int, int, Any, bool]) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Return what a rank has after loading, by name, and the parts of weights that it would save."""
    rank, size, parallel, tied = given
    model, options = toy_model(tied=tied), TrainingOptions(parallel=parallel, padding_free=False)
    with ranks(rank, size) as world:
        carry(model, world, from_main=False, check=head_of)
        module = training_module(model, options, precision="fp32", world=world, trains=True)
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors_of(module, None)[0], is_coordinator=True)
        chunks = [(item.index.fqn, item.tensor_data.chunk) for item in planner.create_local_plan().items]
        saved = [(name, tuple(chunk.offsets), tuple(chunk.sizes)) for name, chunk in chunks]
        return {name: p.to_local().detach().numpy() for name, p in module.model.named_parameters()}, saved


@pytest.mark.slow
@pytest.mark.parametrize(("size", "parallel"), [(6, "fsdp"), (16, "hsdp")])
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.filterwarnings("ignore:Set timeout")
def test_ranks_load_and_save_every_row_once(size, parallel, tied):
    """Ranks of one process would share torch's cache of meshes, whose places are those of the first."""
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        found = pool.map(loaded, [(rank, size, parallel, tied) for rank in range(size)], chunksize=1)
    saved = {part for _, parts in found for part in parts}
    per_copy = 8 if parallel == "hsdp" else size
    for name, p in toy_model(tied=tied).named_parameters():
        for first in range(0, size, per_copy):
            rows = np.concatenate([parts[name] for parts, _ in found[first : first + per_copy]])
            np.testing.assert_array_equal(rows, p.detach().float().numpy())
        assert sum(math.prod(sizes) for owner, _, sizes in saved if owner == f"weights/model.{name}") == p.numel()
