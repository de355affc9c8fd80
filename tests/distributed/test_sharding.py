"""Two real ranks (gloo), DDP and FSDP2: their gradients are the formula's, and what they send is counted
(T2, T11, T16, T17, T18)."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, Unit
from sftmix.common.world import World
from sftmix.components import SFTMix
from sftmix.training.module import TrainingModule, gradient_sync, unwrap
from sftmix.training.parallel import wrap
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
WAYS = [(parallel, tied) for parallel in ("ddp", "fsdp") for tied in (False, True)]
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


def accumulate(world: World, parallel: str, tied: bool):
    """Gradients of a global batch as the step computes them; lambdas of this rank; collectives of each micro-batch."""
    module = wrap(TrainingModule(toy_model(tied=tied), chunk_size=4), parallel=parallel, precision="fp32", world=world)
    lambdas: dict = {}
    objective = Exact(objective=SFTMix(mu=MU), seen=lambdas)
    batches = [collate(ranks[world.rank], DATA, n_segments=1) for ranks in WINDOW]
    plans = [objective.plan(b, step=1, total_steps=2, seed=0) for b in batches]
    ntp, mixup = world.sum([sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans)])
    counts = []
    for k, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=world.size)
        with Collectives() as collectives, gradient_sync(module, k == len(batches) - 1):
            module(batch, scaled).loss.backward()
        counts.append(dict(collectives.count))
    return module, lambdas, counts


def rank_work(world: World, path: str) -> None:
    for parallel, tied in WAYS:
        wrapped, lambdas, counts = accumulate(world, parallel, tied)
        model = unwrap(wrapped).model
        shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert shared is tied
        gradients = {}
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            gradients[name] = whole.clone().contiguous()
        place = Path(path) / f"{parallel}-{tied}-{world.rank}"
        save_file(gradients, place.with_suffix(".safetensors"))
        pairs = [[*ids, values] for ids, values in lambdas.items()]
        place.with_suffix(".json").write_text(json.dumps({"lambdas": pairs, "counts": counts}))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    on_ranks(rank_work, str(path))
    return path


def read(ranks: Path, parallel: str, tied: bool, rank: int) -> dict:
    return json.loads((ranks / f"{parallel}-{tied}-{rank}.json").read_text())


@pytest.mark.parametrize(("parallel", "tied"), WAYS)
def test_gradients_of_two_ranks_are_the_formulas(ranks, parallel, tied):
    """A rank whose pairs are all gone, and a rank with nothing but a filler, join; no gradient is halved (tied)."""
    told = [read(ranks, parallel, tied, rank) for rank in (0, 1)]
    assert told[1]["lambdas"] == []
    lambdas = {(c, u): values for c, u, values in told[0]["lambdas"]}
    units = [unit for step in WINDOW for rank in step for unit in rank]
    _, expected = naive(toy_model(tied=tied), DATA, units, lambdas, mu=MU, mixup_mean="own")
    for rank in (0, 1):
        found = load_file(ranks / f"{parallel}-{tied}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


def gathered_size(tied: bool) -> int:
    """Elements of the group of embeddings, final norm and head, every parameter padded to two equal shards."""
    model = toy_model(tied=tied)
    own = [p for name, p in model.named_parameters() if ".h." not in name]
    return sum(-(-p.shape[0] // 2) * 2 * p[0].numel() for p in own)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_gathered_once_a_micro_batch_and_reduced_once_a_step(ranks, tied):
    """However many chunks the loss has; gathering per chunk would cost half of a step."""
    size = gathered_size(tied)
    for rank in (0, 1):
        first, last = read(ranks, "fsdp", tied, rank)["counts"]
        assert (first[f"all_gather {size}"], last[f"all_gather {size}"]) == (1, 1)
        assert not [k for k in first if k.startswith("reduce_scatter")]  # T18: nothing is reduced before the last
        assert last[f"reduce_scatter {size}"] == 1
        assert sum(n for k, n in last.items() if k.startswith("reduce_scatter")) == 3  # and each of the two layers


def test_ddp_reduces_on_the_last_accumulation_step_only(ranks):
    for rank in (0, 1):
        first, last = read(ranks, "ddp", False, rank)["counts"]
        assert not any(k.startswith("all_reduce") for k in first)
        moved = sum(int(k.split()[1]) * n for k, n in last.items() if k.startswith("all_reduce"))
        assert moved == sum(p.numel() for p in toy_model().parameters())
