"""The loop of docs/own-loop.md: it runs with torch alone, and its ranks take the step of the whole batch."""

import subprocess
import sys
from importlib.metadata import requires
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sftmix.functional import SFTMixLoss
from tests.forked import on_ranks
from tests.test_docs import ROOT, blocks

BLOCKS = blocks(ROOT / "docs" / "own-loop.md", "python")
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""
IMPORTS = {"pyyaml": "yaml"}
"""What a requirement is imported as, if by another name."""


TORCHS = {"filelock", "jinja2"}
"""Requirements of torch, too."""


@pytest.mark.slow
def test_the_page_runs_with_torch_alone():
    """Nothing else that the project requires can be imported: as after `pip install --no-deps`."""
    more = {Requirement(one).name for one in requires("sftmix") or ()} - {"torch", "sftmix", *TORCHS}
    assert {"transformers", "numpy", "pyarrow", "pyyaml"} <= more
    script = "\n".join([BLOCKED.format(names={IMPORTS.get(name, name) for name in more}), *BLOCKS])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def batch() -> list[tuple[torch.Tensor, ...]]:
    """Two micro-batches with other numbers of tokens and of token pairs, and the global batch that they make."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (4, 12), generator=random)
    labels = ids.clone()
    for row, start in enumerate((3, 5, 10, 7)):
        labels[row, :start] = -100
    one, lam = torch.tensor([[0, 1]]), torch.tensor([0.3, 0.9])
    halves = [(ids[:2], labels[:2], one, lam[:1]), (ids[2:], labels[2:], one, lam[1:])]
    return [*halves, (ids, labels, torch.tensor([[0, 1], [2, 3]]), lam)]


def gradients_of_page(wrapped: Any, micro_batches: list[tuple[torch.Tensor, ...]], ranks: int) -> list[torch.Tensor]:
    """Return those that the page's loop leaves in its module, which `wrapped` changes."""
    page: dict[str, Any] = {}
    exec(BLOCKS[0] + BLOCKS[1], page)
    torch.manual_seed(0)
    module = page["LossOfModel"](torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50), SFTMixLoss(0.5))
    outer = wrapped(module)
    page["global_batch"](outer, micro_batches, ranks)
    grads = [parameter.grad for parameter in module.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


def one_rank(world, kind):
    *halves, whole = batch()
    found = gradients_of_page(DistributedDataParallel if kind == "ddp" else fully_shard, halves[world.rank :][:1], 2)
    torch.testing.assert_close(found, gradients_of_page(lambda module: module, [whole], 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_take_the_step_of_the_whole_batch(kind):
    on_ranks(one_rank, kind)


def test_two_micro_batches_take_the_step_of_the_whole_batch():
    *halves, whole = batch()
    found, right = (gradients_of_page(lambda module: module, given, 1) for given in (halves, [whole]))
    torch.testing.assert_close(found, right)
