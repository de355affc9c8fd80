"""NEFTune: size, distribution and independence of what an example is batched with."""

import math

import torch

from sftmix.components import NEFTune
from sftmix.ranks.rng import generator
from tests.toy import rounding

AT = {"step": 3, "seed": 7}


def mask_of(lengths, width):
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()


def test_the_noise_is_the_papers_and_drawn_from_seed_step_and_id():
    e, mask = torch.randn(2, 5, 8, dtype=torch.float64), mask_of([5, 3], 5)
    found = NEFTune(alpha=10.0).embeddings(e, mask, ids=["a", "b"], **AT) - e
    for place, (name, length) in enumerate((("a", 5), ("b", 3))):
        u = torch.from_numpy(generator(7, "neftune", 3, name).random((length, 8), dtype="float32")) * 2 - 1
        noise = u * 10 / math.sqrt(length * 8)
        limit = rounding(noise, 4)  # operations that make it
        torch.testing.assert_close(found[place, :length].float(), noise, rtol=0, atol=limit)
    assert (found[1, 3:] == 0).all()


def test_padding_on_the_left_is_no_token():
    """Alone, or padded on the left: the same numbers on the same tokens. On the right: in their contract."""
    alone = NEFTune().embeddings(torch.zeros(1, 4, 6), mask_of([4], 4), ids=["x"], **AT)
    left = NEFTune().embeddings(torch.zeros(1, 9, 6), mask_of([4], 9).flip(1), ids=["x"], **AT)
    assert torch.equal(alone[0], left[0, 5:])
    assert (left[0, :5] == 0).all()


def test_dtype_gradient_and_empty_rows():
    e = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    out = NEFTune().embeddings(e, mask, ids=["a", "b"], **AT)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[1], e[1])
    out.float().sum().backward()
    assert torch.equal(e.grad, torch.ones_like(e))
