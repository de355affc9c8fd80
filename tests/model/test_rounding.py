"""Stochastic rounding: neighbours, probabilities and draws by formulas of their own, and the same bits for any part."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftmix.model.rounding import BLOCK, round_in_place, stochastically_rounded
from sftmix.ranks.rng import generator
from sftmix.words.errors import ConfigError

DTYPES = (torch.bfloat16, torch.float16)
BITS = st.integers(0, 2**32 - 1)
"""A float32 of any kind: subnormal, negative, infinite, NaN."""


def floats(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))


def around(x: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of `dtype` that is not above each finite x, and the smallest not below, in float64."""
    values = x.numpy()
    if dtype == torch.bfloat16:  # the upper half of a float32: without the lower half, a value comes nearer to zero
        near = values.view(np.uint32) & np.uint32(0xFFFF0000)
        far = np.where(near == values.view(np.uint32), near, near + np.uint64(0x10000)).astype(np.uint32)
        ends = near.view(np.float32), far.view(np.float32)
    else:
        with np.errstate(over="ignore"):
            nearest = values.astype(np.float16)
        up = np.where(nearest < values, np.nextafter(nearest, np.float16(np.inf)), nearest)
        down = np.where(nearest > values, np.nextafter(nearest, np.float16(-np.inf)), nearest)
        ends = down, up
    both = np.stack([end.astype(np.float64) for end in ends])
    return both.min(0), both.max(0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(bits=st.lists(BITS, min_size=1, max_size=50), seed=st.integers(0, 99))
def test_each_result_is_one_of_two_neighbours_and_a_value_that_the_dtype_has_stays(dtype, bits, seed):
    x = floats(bits)
    x = x[x.abs() <= torch.finfo(dtype).max]
    rounded = stochastically_rounded(x, dtype, seed=seed, name="w").double().numpy()
    down, up = around(x, dtype)
    assert ((rounded == down) | (rounded == up)).all()
    exact = x.to(dtype)
    again = stochastically_rounded(exact.float(), dtype, seed=seed, name="w")
    assert torch.equal(again.view(torch.int16), exact.view(torch.int16))  # the sign of -0.0, too


@pytest.mark.parametrize("dtype", DTYPES)
@given(bits=BITS, seed=st.integers(0, 99))
def test_a_value_is_kept_on_average(dtype, bits, seed):
    x = floats([bits])
    x = torch.where(x.abs() < torch.finfo(dtype).max / 2, x, torch.tensor(1.2345))
    (down,), (up,) = around(x, dtype)
    rounded = stochastically_rounded(x.expand(3 * BLOCK), dtype, seed=seed, name="w").double().numpy()
    share = 0.0 if up == down else (float(x) - down) / (up - down)
    risen, deviation = float((rounded == up).mean()) if up > down else 0.0, (share * (1 - share) / len(rounded)) ** 0.5
    assert abs(risen - share) <= 5 * deviation


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_draws_are_those_of_the_seed_the_name_and_the_place(dtype):
    x = torch.randn(BLOCK + 300, generator=torch.Generator().manual_seed(0))
    u = [generator(5, "rounding", "a.weight", first).random(BLOCK) for first in (0, BLOCK)]
    nearest = x.to(dtype).double().numpy()
    down, up = around(x, dtype)
    other = np.where(nearest == up, down, up)
    moves = np.abs(x.double().numpy() - nearest) > np.concatenate(u)[: len(x)] * (up - down)
    rounded = stochastically_rounded(x, dtype, seed=5, name="a.weight")
    assert (rounded.double().numpy() == np.where(moves, other, nearest)).all()
    assert 0.2 < moves.mean() < 0.3  # of the uniform share of a gap, a quarter
    for seed, name in ((6, "a.weight"), (5, "b.weight")):
        assert not torch.equal(stochastically_rounded(x, dtype, seed=seed, name=name), rounded)


@given(cuts=st.lists(st.integers(0, 2 * BLOCK + 77), max_size=4))
def test_parts_of_a_tensor_are_rounded_as_the_whole(cuts):
    x = torch.randn(2 * BLOCK + 77, generator=torch.Generator().manual_seed(1))
    whole = stochastically_rounded(x.view(-1, 1), torch.bfloat16, seed=0, name="w").view(-1)
    ends = sorted([0, *cuts, len(x)])
    parts = [
        stochastically_rounded(x[start:end], torch.bfloat16, seed=0, name="w", start=start)
        for start, end in pairwise(ends)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_what_is_not_finite_stays_and_nothing_finite_becomes_infinite_that_is_not_by_nearest():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 65519.0, -65519.0, 65520.0]).expand(1000, 6)
    rounded = stochastically_rounded(x, torch.float16, seed=0, name="w")
    expected = torch.tensor([float("inf"), -float("inf"), float("nan"), 65504.0, -65504.0, float("inf")])
    torch.testing.assert_close(rounded.float(), expected.expand(1000, 6), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_precision_rounds_nothing(dtype):
    x = torch.randn(99, dtype=torch.float64).float()
    assert torch.equal(stochastically_rounded(x, dtype, seed=0, name="w"), x.to(dtype))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_weights_are_rounded_in_place_and_a_value_without_room_is_refused_by_name(rounding):
    weights = {"a": torch.full((7, 3), 0.1234567), "ids": torch.arange(3), "frozen": torch.full((4,), 0.5)}
    held = dict(weights)
    round_in_place(weights, torch.bfloat16, rounding=rounding, seed=0)
    assert all(weights[name] is x for name, x in held.items())
    expected = torch.full((7, 3), 0.1234567).bfloat16()
    if rounding == "stochastic":
        expected = stochastically_rounded(torch.full((7, 3), 0.1234567), torch.bfloat16, seed=0, name="a")
    assert torch.equal(weights["a"], expected.float())
    assert torch.equal(weights["frozen"], torch.full((4,), 0.5))
    with pytest.raises(ConfigError, match=r"big has the value -?100000, which torch.float16 .* ends at 65504"):
        round_in_place({"big": torch.tensor([1.0, -1e5])}, torch.float16, rounding=rounding, seed=0)
