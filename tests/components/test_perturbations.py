"""NEFTune: size, distribution and independence of what an example is batched with."""

from __future__ import annotations

import math

import pytest
import torch

from sftmix.common.errors import ConfigError
from sftmix.common.rng import generator
from sftmix.components import NEFTune

AT = {"step": 3, "seed": 7}


def mask_of(lengths, width):
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()


def test_the_noise_is_the_papers_and_drawn_from_seed_step_and_id():
    e, mask = torch.randn(2, 5, 8), mask_of([5, 3], 5)
    found = NEFTune(alpha=10.0).embeddings(e, mask, ids=["a", "b"], **AT) - e
    for place, (name, length) in enumerate((("a", 5), ("b", 3))):
        u = torch.from_numpy(generator(7, "neftune", 3, name).random((length, 8), dtype="float32")) * 2 - 1
        torch.testing.assert_close(found[place, :length], u * 10 / math.sqrt(length * 8), rtol=0, atol=1e-6)
    assert (found[1, 3:] == 0).all()


def test_it_does_not_depend_on_the_batch():
    """Alone and unpadded, or padded on either side beside a longer one: the same numbers on the same tokens."""
    neftune, e = NEFTune(), torch.zeros(1, 4, 6)
    alone = neftune.embeddings(e, torch.ones(1, 4, dtype=torch.int64), ids=["x"], **AT)
    right = neftune.embeddings(torch.zeros(2, 9, 6), mask_of([9, 4], 9), ids=["y", "x"], **AT)
    left = neftune.embeddings(torch.zeros(1, 9, 6), mask_of([4], 9).flip(1), ids=["x"], **AT)
    assert torch.equal(alone[0], right[1, :4])
    assert torch.equal(alone[0], left[0, 5:])
    assert (left[0, :5] == 0).all()


def test_other_ids_steps_and_seeds_draw_anew():
    e, mask = torch.zeros(1, 4, 6), torch.ones(1, 4, dtype=torch.int64)
    keys = [("x", 3, 7), ("y", 3, 7), ("x", 4, 7), ("x", 3, 8)]
    drawn = [NEFTune().embeddings(e, mask, ids=[name], step=step, seed=seed) for name, step, seed in keys]
    for a in range(len(drawn)):
        for b in range(a):
            assert (drawn[a] == drawn[b]).float().mean() < 0.05


def test_moments():
    """Uniform in (-1, 1): mean 0, variance 1/3, fourth moment 1/5, within four standard errors of 60,000 numbers."""
    length, size, alpha = 200, 300, 5.0
    noise = NEFTune(alpha=alpha).embeddings(
        torch.zeros(1, length, size), torch.ones(1, length, dtype=torch.int64), ids=["a"], **AT
    )
    u = (noise * math.sqrt(length * size) / alpha).double().flatten()
    n = len(u)
    assert u.abs().max() <= 1 + 1e-6
    assert u.abs().max() > 0.999
    assert abs(float(u.mean())) < 4 * math.sqrt(1 / 3 / n)
    assert abs(float((u**2).mean()) - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / n)
    assert float(noise.norm()) == pytest.approx(alpha / math.sqrt(3), rel=0.01)  # the same for any length and size


def test_dtype_gradient_and_empty_rows():
    e = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    out = NEFTune().embeddings(e, mask, ids=["a", "b"], **AT)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[1], e[1])
    out.float().sum().backward()
    assert torch.equal(e.grad, torch.ones_like(e))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_wrong_options_are_named(alpha):
    with pytest.raises(ConfigError, match=rf"perturbation\.alpha is {alpha}; allowed: a number above 0"):
        NEFTune(alpha=alpha)
