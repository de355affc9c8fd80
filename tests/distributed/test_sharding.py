"""Two real ranks (gloo), DDP and FSDP2: their gradients are the formula's, and what they send is counted
(T2, T11, T16, T17, T18)."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, Unit
from sftmix.components import EAFT, CutMix, EmbeddingMixup, ManifoldMixup, MixtureDivergence, SFTMix
from sftmix.ranks.world import World
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import gradient_sync, unwrap, wrap
from sftmix.training.step import normalise
from tests.forked import on_ranks
from tests.toy import toy_model, toy_rows
from tests.training.test_step import Exact, naive

pytestmark = pytest.mark.slow

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])
FILLER = (Slot(0, 0.0),)
# Two accumulation steps. On rank 1 there is no pair in the first and no example with a weight in the second.
WINDOW: list[list[list[Unit]]] = [
    [[(Slot(0), Slot(1)), (Slot(4),)], [(Slot(2),), (Slot(3),)]],
    [[(Slot(5), Slot(6))], [FILLER]],
]
MU = 0.75
COUNTED = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}


class Collectives(TorchDispatchMode):
    """How often each collective moves a (gathered) tensor of how many elements, and in which dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = COUNTED.get(func.__name__.split(".")[0]) if func.namespace == "c10d" else None
        if name:
            whole = args[1] if name == "reduce_scatter" else args[0]
            moved = [whole] if isinstance(whole, torch.Tensor) else whole
            self.count[f"{name} {sum(t.numel() for t in moved)}"] += 1
            self.dtypes.setdefault(name, set()).update(t.dtype for t in moved)
        return func(*args, **(kwargs or {}))


OWN: list[Any] = [EmbeddingMixup(mu=MU), ManifoldMixup(mu=MU, layers=1), CutMix(mu=MU), MixtureDivergence(mu=MU)]
OWN += [EAFT(mixup=EmbeddingMixup(mu=MU))]
OBJECTIVES = {"SFTMix": SFTMix(mu=MU), **{type(objective).__name__: objective for objective in OWN}}
"""The others have passes of their own, of which rank 1 makes as many as rank 0."""
WAYS = [(parallel, name, tied) for parallel in ("ddp", "fsdp") for name in OBJECTIVES for tied in (True, False)]
WAYS = [way for way in WAYS if way[2] or way[1] in ("SFTMix", "EAFT")]


def accumulate(world: World, parallel: str, name: str, tied: bool, shares: list[int]):
    """Gradients of a global batch as the step computes them; lambdas of this rank; collectives of each micro-batch.

    shares  of WINDOW that this rank computes: its own of two, or both
    """
    module = wrap(TrainingModule(toy_model(tied=tied), chunk_size=4), parallel=parallel, precision="fp32", world=world)
    lambdas: dict = {}
    objective = Exact(objective=OBJECTIVES[name], seen=lambdas)
    batches = [collate(ranks[share], DATA, n_segments=1) for ranks in WINDOW for share in shares]
    plans = [objective.plan(b, step=1, total_steps=2, seed=0) for b in batches]
    ntp, mixup = world.sum([sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans)])
    counts = []
    for k, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=world.size)
        with Collectives() as collectives, gradient_sync(module, k == len(batches) - 1):
            module(batch, scaled, loss=objective.loss).loss.backward()
        counts.append(dict(collectives.count))
    model = unwrap(module).model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    whole = {n: p.grad.full_tensor() if parallel == "fsdp" else p.grad for n, p in model.named_parameters()}
    return {n: gradient.clone().contiguous() for n, gradient in whole.items()}, lambdas, counts


def rank_work(world: World, path: str) -> None:
    for way in WAYS:
        gradients, lambdas, counts = accumulate(world, *way, [world.rank])
        torch.save((gradients, lambdas, counts), Path(path) / f"{way}-{world.rank}")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of a rank and a way: what `accumulate` returned there."""
    path = tmp_path_factory.mktemp("ranks")
    on_ranks(rank_work, str(path))
    return lambda rank, *way: torch.load(path / f"{way}-{rank}")


def assert_same(found, way, expected) -> None:
    for rank in (0, 1):
        gradients = found(rank, *way)[0]
        assert gradients.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("parallel", "name", "tied"), [way for way in WAYS if way[1] == "SFTMix"])
def test_gradients_of_two_ranks_are_the_formulas(found, parallel, name, tied):
    """A rank whose pairs are all gone, and a rank with nothing but a filler, join; no gradient is halved (tied)."""
    lambdas = found(0, parallel, name, tied)[1]
    assert found(1, parallel, name, tied)[1] == {}
    units = [unit for step in WINDOW for rank in step for unit in rank]
    _, expected = naive(toy_model(tied=tied), DATA, units, lambdas, mu=MU, mixup_mean="own")
    assert_same(found, (parallel, name, tied), expected)


@pytest.mark.parametrize("way", [way for way in WAYS if way[1] != "SFTMix"], ids=str)
def test_gradients_of_two_ranks_are_those_of_one_process(found, way):
    assert_same(found, way, accumulate(World(), "none", *way[1:], [0, 1])[0])


def gathered_sizes(tied: bool) -> list[int]:
    """Elements of the groups: final norm and head, the embeddings, and the positions, which are outside both; one group
    if head and embeddings are tied. Every parameter is padded to two equal shards.
    """
    sizes = {name: -(-p.shape[0] // 2) * 2 * p[0].numel() for name, p in toy_model(tied=tied).named_parameters()}
    outside = sum(size for name, size in sizes.items() if ".h." not in name)
    embeddings, positions = sizes["transformer.wte.weight"], sizes["transformer.wpe.weight"]
    return [outside] if tied else [outside - embeddings - positions, embeddings, positions]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_gathered_once_a_micro_batch_and_reduced_once_a_step(found, tied):
    """However many chunks the loss has; gathering per chunk would cost half of a step. Embeddings that are not tied to
    it are reduced by themselves: of a vocabulary of 128,000 the two are 4 GB in float32."""
    sizes = gathered_sizes(tied)
    for rank in (0, 1):
        first, last = found(rank, "fsdp", "SFTMix", tied)[2]
        for size in sizes:
            assert (first[f"all_gather {size}"], last[f"all_gather {size}"]) == (1, 1)
            assert last[f"reduce_scatter {size}"] == 1
        assert not [k for k in first if k.startswith("reduce_scatter")]  # T18: nothing is reduced before the last
        # and each of the two layers
        assert sum(n for k, n in last.items() if k.startswith("reduce_scatter")) == 2 + len(sizes)


def test_ddp_reduces_on_the_last_accumulation_step_only(found):
    for rank in (0, 1):
        first, last = found(rank, "ddp", "SFTMix", False)[2]
        assert not any(k.startswith("all_reduce") for k in first)
        moved = sum(int(k.split()[1]) * n for k, n in last.items() if k.startswith("all_reduce"))
        assert moved == sum(p.numel() for p in toy_model().parameters())
