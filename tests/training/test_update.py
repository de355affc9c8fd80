"""Clipped and updated in one pass, as torch's fused optimizers do on CUDA: here the same code on a CPU."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from sftmix.ranks.world import World
from sftmix.training.optimizer_state import kept_values
from sftmix.training.update import clip_and_update, clip_gradients, decides_on_device, gradient_norm, gradient_shards
from tests.forked import on_ranks

LIMIT = 0.5
FUSED: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "fused": True}


def model_of(gradients: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    if gradients:
        give(model)
    return model


def give(model: nn.Module, factor: float = 1.0) -> None:
    inputs = torch.randn(11, 7, generator=torch.Generator().manual_seed(1))
    (factor * model(inputs).square().sum()).backward()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def norm_of(model: nn.Module) -> torch.Tensor:
    return gradient_norm(model, gradient_shards(model))


@pytest.mark.parametrize("limit", [0.0, LIMIT, 1e9])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_the_update_is_that_of_clipped_gradients(make, limit):
    """A gradient divided by 1 / f is the gradient times f but for float32's rounding."""
    one, two = model_of(), model_of()
    optimizers = [make(model.parameters(), **FUSED) for model in (one, two)]
    for _ in range(3):
        norms = [norm_of(model) for model in (one, two)]
        assert norms[0] > LIMIT
        clip_and_update(optimizers[0], norms[0], torch.tensor(1.0), limit, World())
        clip_gradients(gradient_shards(two), norms[1], limit)
        optimizers[1].step()
        torch.testing.assert_close(weights(one), weights(two), rtol=1e-5, atol=1e-7)
        for model in (one, two):
            model.zero_grad()
            give(model)


@pytest.mark.parametrize(("norm", "loss"), [("nan", "1"), ("inf", "1"), ("2", "nan"), ("2", "-inf")])
def test_a_step_that_is_not_finite_is_left_out_and_not_counted(norm, loss):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), **FUSED)
    clip_and_update(optimizer, norm_of(model), torch.tensor(1.0), LIMIT, World())
    before, state = weights(model), optimizer.state_dict()
    kept = [x.clone() for entry in state["state"].values() for x in entry.values()]
    clip_and_update(optimizer, torch.tensor(float(norm)), torch.tensor(float(loss)), LIMIT, World())
    assert all(map(torch.equal, weights(model), before))
    assert all(map(torch.equal, [x for entry in state["state"].values() for x in entry.values()], kept))


def test_the_optimizer_keeps_nothing_of_it():
    """A resume would not bring it back."""
    model = model_of()
    optimizer, names = torch.optim.AdamW(model.parameters(), **FUSED), dict(model.named_parameters())
    before = {name for name in kept_values(names, optimizer) if name.startswith("self")}
    clip_and_update(optimizer, norm_of(model), torch.tensor(1.0), LIMIT, World())
    assert {name for name in kept_values(names, optimizer) if name.startswith("self")} == before


class Own(torch.optim.AdamW):
    """Its step may read gradients before torch's does."""


def test_only_fused_adam_of_torch_on_cuda_is_asked():
    model = model_of(gradients=False)
    assert not decides_on_device(torch.optim.AdamW(model.parameters(), **FUSED))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        on_gpu = [nn.Parameter(torch.empty(3, device="cuda"))]
        assert decides_on_device(torch.optim.AdamW(on_gpu, **FUSED))
        assert decides_on_device(torch.optim.Adam(on_gpu, **FUSED))
        # Its kernel would go on from momentum that a first step that is left out has not written.
        assert not decides_on_device(torch.optim.SGD(on_gpu, **FUSED, momentum=0.9))
        assert not decides_on_device(torch.optim.AdamW(on_gpu))
        assert not decides_on_device(Own(on_gpu, **FUSED))


def check_ranks(world: World) -> None:
    """Of shards; and a loss of one rank that is not finite holds back all."""
    whole, shared = model_of(), model_of(gradients=False)
    fully_shard(shared)
    give(shared)
    optimizers: list[Any] = [torch.optim.AdamW(model.parameters(), **FUSED) for model in (whole, shared)]
    clip_gradients(gradient_shards(whole), norm_of(whole), LIMIT)
    optimizers[0].step()
    clip_and_update(optimizers[1], norm_of(shared), torch.tensor(1.0), LIMIT, world)
    torch.testing.assert_close(weights(shared), weights(whole), rtol=1e-5, atol=1e-7)
    before = weights(shared)
    loss = torch.tensor(float("nan") if world.rank else 1.0)
    clip_and_update(optimizers[1], norm_of(shared), loss, LIMIT, world)
    assert all(map(torch.equal, weights(shared), before))


@pytest.mark.slow
def test_ranks_that_share_the_weights_update_alike():
    on_ranks(check_ranks)
