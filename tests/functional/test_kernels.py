"""The Triton kernels, interpreted on the CPU, give what torch's passes give; and they compile for absent GPUs."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install triton==3.7.1 (0.7 GB) runs these")

import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sftmix.functional import fused, kernels
from sftmix.functional.fused import Figures, Pass

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter's sigmoid: it is 0


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Interpret the kernels and the functions of Triton's own that they call, in these tests alone.

    The variable by itself decides when a function is defined, and others import Triton first: `torch._dynamo`, with any
    model of transformers. Then `tl.max` stays one to be compiled.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    for module in (triton.language, triton.language.standard, kernels):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(function.fn))


def labels(rows, vocabulary):
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0))


def passes(x, rows, pairs, softcap, *, one_label=False, trains=True):
    """(gradients, nll, mixup), or without gradients (hits, nll, mixup), of both ways.

    x  logits [rows, V], whose first rows are the columns of pairs
    """
    label, g = labels(rows, x.shape[1]), torch.Generator().manual_seed(1)
    if one_label:
        label[pairs : 2 * pairs] = label[:pairs]
    weight, pair_weight = torch.rand(rows, generator=g), torch.rand(pairs, generator=g)
    weight[::3] = 0.0  # not the first use of its row
    lam = torch.tensor([0.0, 1.0, 0.3, 0.75])[:pairs]
    results = []
    for kernel in (True, False):
        blank = torch.zeros(rows)
        uses = Figures(label, weight, blank.clone(), blank > 0, blank.clone(), blank.clone())
        place, mixup = x.to(x.dtype if kernel else torch.float32, copy=True), torch.zeros(pairs)
        if kernel:
            kernels.differentiate(place, uses, lam, pair_weight, mixup, softcap, trains)
        else:
            hidden = x.new_ones(rows, 1).float().requires_grad_(trains)
            one = Pass(hidden, x.new_ones(1, 1).float(), None, softcap, stats=not trains)
            one.spare = defaultdict(partial(torch.empty, x.shape))
            one.differentiate(place, uses, lam, pair_weight, mixup, rows)
        assert torch.equal(uses.nll, uses.ntp)
        results.append((place if trains else uses.correct, uses.nll, mixup))
    return results


def random_logits(rows, vocabulary, dtype):
    return (6 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize(
    ("vocabulary", "rows", "pairs", "one_label"),
    [(3, 1, 0, False), (7, 9, 4, True), (4096, 2, 1, False), (4097, 9, 3, False), (20_011, 4, 2, True)],
)
def test_they_are_the_passes_of_torch(dtype, softcap, vocabulary, rows, pairs, one_label):
    """lambda 0 and 1 among others; what is beyond the end of a row has no probability, whatever a cap makes of it."""
    found, expected = passes(random_logits(rows, vocabulary, dtype), rows, pairs, softcap, one_label=one_label)
    for n in (1, 2):
        torch.testing.assert_close(found[n], expected[n], rtol=1e-6, atol=1e-5)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[0].float(), expected[0], rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits(softcap):
    """Logits of a padded vocabulary are far below all others; and a row may be sure of another token than its label."""
    x = torch.zeros(6, 5000)
    x[:, 4200:], x[0, 17], x[3, 4999], x[5, 0] = -1e4, 1e4, 1e4, -3e4
    for found, expected in zip(*passes(x, 6, 2, softcap), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_the_loss_of_a_sure_row_is_not_rounded_away():
    """At a logit of 1e4 float32 has steps of 1e-3; the difference to another logit is exact."""
    x = torch.full((2, 5000), -1e4)
    label = labels(2, 5000)
    x[0, label[0]], x[0, (label[0] + 1) % 5000] = 1e4, 1e4 - 8
    x[1, label[1]], x[1, (label[1] + 1) % 5000] = -1e4 + 64, -1e4 + 128
    (_, found, _), _ = passes(x, 2, 0, None)
    exact = torch.log1p(torch.exp(torch.tensor([-8.0, 64.0], dtype=torch.float64)))
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 60.0])
@pytest.mark.parametrize(("vocabulary", "rows"), [(3, 12), (4097, 4), (20_011, 2)])
def test_a_pass_without_gradients_finds_losses_and_hits(dtype, softcap, vocabulary, rows):
    x = random_logits(rows, vocabulary, dtype)
    x[:, 1] = x[0] = -torch.inf  # masked tokens
    x[0, 2] = 1.0
    found, expected = passes(x, rows, 0, softcap, trains=False)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-5)
    assert torch.equal(found[0], expected[0])


def test_of_equal_logits_the_first_is_the_hit():
    x = torch.zeros(9, 7)
    x[::2, 3] = -1.0
    (found, _, _), (expected, _, _) = passes(x, 9, 0, None, trains=False)
    label = labels(9, 7)
    assert torch.equal(found, expected)
    assert found.tolist() == [y == 0 for y in label.tolist()]
    x[torch.arange(9), label] = 1.0
    assert all(result.all() for result, _, _ in passes(x, 9, 0, None, trains=False))


def test_a_loss_with_them_is_the_loss():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).requires_grad_() for n in (9, 999))
    labels, pairs = torch.randint(0, 999, (9,), generator=g), torch.tensor([[0, 1], [2, 3], [2, 5]])
    given = (labels, pairs, torch.rand(3, generator=g), torch.rand(9, generator=g), torch.rand(3, generator=g))
    found, expected = [], []
    for into, backend in ((found, kernels), (expected, None)):
        one = Pass(hidden, weight, None)
        one.kernels = backend
        loss, figures, mixup = one.loss(*given, fused.unpaired_rows(pairs, 9), 5)
        into += [loss, figures.nll, mixup, *one.gradients]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_scaled_by_a_number_that_the_host_does_not_read(dtype):
    """Each place once, also if a program has several blocks. The interpreter cuts bf16 off."""
    x = torch.randn(3, 4321, generator=torch.Generator().manual_seed(0)).to(dtype)
    for factor in (1.0, 0.0, 1 / 3):
        found, number = x.clone(), torch.tensor([7.0, factor])[1]
        kernels.scale(found, number)
        rounding = {"rtol": 2**-7 if dtype == torch.bfloat16 and factor != 1 else 0, "atol": 0}
        torch.testing.assert_close(found.float(), x.float() * number, **rounding)


def test_kernels_that_give_other_numbers_are_left_out_with_one_line(monkeypatch):
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert fused.working_kernels.__wrapped__(cpu, dtype, None) is kernels
    shipped = kernels.differentiate
    monkeypatch.setattr(kernels, "differentiate", lambda x, *more: shipped(x, *more) or x.mul_(1.1))
    with pytest.warns(UserWarning, match="the Triton kernels of the loss are left out on cpu") as seen:
        assert fused.working_kernels.__wrapped__(cpu, torch.float32, None) is None
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "cuda 100 32", "hip gfx942 64"])
def test_they_compile_for_gpus_and_touch_a_logit_three_times(target):
    """Two loads and a store of bf16 for each logit of a row, or of a pair's two: six bytes a logit; scoring takes two.

    On NVIDIA's, threads meet outside the loops alone, and three programs of 512 threads with pairs fit a processor.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, str(ROOT / "benchmarks" / "compiled_kernels.py"), "--target", target]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 6
    for one in found:
        logits = 2 if one["kernel"] == "_pairs" else 1
        passes = 2 if one.get("trains", logits == 2) else 1
        assert one["loads"] == passes * logits
        assert one["stores"] == (0 if one.get("trains") is False else logits)
        if target.startswith("cuda"):
            assert len(one["loops"]) == passes
            assert not any(loop["barriers"] for loop in one["loops"])
            assert one["spilled_bytes"] == 0
            assert one["registers"] <= 40 or one["softcap"]
