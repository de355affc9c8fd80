"""The Triton kernels, interpreted on the CPU, give what torch's passes give; and they compile for absent GPUs."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install triton==3.7.1 (0.7 GB) runs these")

import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sftmix.functional import fused, kernels
from sftmix.functional.fused import Figures, Pass


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Interpret the kernels and the functions of Triton's own that they call, in these tests alone.

    The variable by itself decides when a function is defined, and others import Triton first: `torch._dynamo`, with any
    model of transformers. Then `tl.max` stays one to be compiled.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (triton.language, triton.language.standard, kernels):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(function.fn))


def passes(x, rows, pairs, softcap, seed=0):
    """(gradients, nll, mixup) of both ways on the same logits [rows, V], whose first rows are the columns of pairs."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, x.shape[1], (rows,), generator=g)
    weight, pair_weight = torch.rand(rows, generator=g), torch.rand(pairs, generator=g)
    weight[::3] = 0.0  # not the first use of its row
    lam = torch.tensor([0.0, 1.0, 0.3, 0.75])[:pairs]
    results = []
    for kernel in (True, False):
        blank = torch.zeros(rows)
        uses = Figures(label, weight, blank.clone(), blank.clone(), blank, blank > 0)
        place, mixup = x.clone() if kernel else x.float(), torch.zeros(pairs)
        if kernel:
            kernels.gradients(place, uses, lam, pair_weight, mixup, softcap)
        else:
            one = Pass(x.new_ones(rows, 1).float().requires_grad_(), x.new_ones(1, 1).float(), None, softcap)
            one.spare = defaultdict(partial(torch.empty, x.shape))
            one.differentiate(place, uses, lam, pair_weight, mixup, rows)
        assert torch.equal(uses.nll, uses.ntp)
        results.append((place, uses.nll, mixup))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("vocabulary", "rows", "pairs"), [(3, 1, 0), (7, 9, 4), (4097, 9, 3), (128_256, 3, 1)])
def test_they_are_the_passes_of_torch(dtype, softcap, vocabulary, rows, pairs):
    x = (6 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))).to(dtype)
    (found, nll, mixup), (gradient, expected_nll, expected_mixup) = passes(x, rows, pairs, softcap)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(mixup, expected_mixup, rtol=1e-6, atol=1e-5)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), gradient, rtol=rounding, atol=1e-7)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter's sigmoid, which is right
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits(softcap):
    """Logits of a padded vocabulary are far below all others; and a row may be sure of another token than its label."""
    x = torch.zeros(6, 5000)
    x[:, 4200:], x[0, 17], x[3, 4999], x[5, 0] = -1e4, 1e4, 1e4, -3e4
    for found, expected in zip(*passes(x, 6, 2, softcap), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_loss_with_them_is_the_loss():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).requires_grad_() for n in (9, 999))
    labels, pairs = torch.randint(0, 999, (9,), generator=g), torch.tensor([[0, 1], [2, 3], [2, 5]])
    given = (labels, pairs, torch.rand(3, generator=g), torch.rand(9, generator=g), torch.rand(3, generator=g))
    found, expected = [], []
    for into, backend in ((found, kernels), (expected, None)):
        one = Pass(hidden, weight, None)
        loss, figures, mixup = one.loss(*given, fused.rows_alone(pairs, 9), 5, backend)
        into += [loss, figures.nll, mixup, *one.gradients]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-5)


def test_kernels_that_give_other_numbers_are_left_out_with_one_line(monkeypatch):
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert fused.working_kernels.__wrapped__(cpu, dtype, None) is kernels
    shipped = kernels.gradients
    monkeypatch.setattr(kernels, "gradients", lambda x, *more: shipped(x, *more) or x.mul_(1.1))
    with pytest.warns(UserWarning, match="the Triton kernels of the loss are left out on cpu") as seen:
        assert fused.working_kernels.__wrapped__(cpu, torch.float32, None) is None
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sftmix.functional import kernels

numbers = dict(weight="*fp32", nll="*fp32", V="i32", softcap="constexpr", BLOCK="constexpr")
pair = dict(lam="*fp32", pair_weight="*fp32", mixup="*fp32", M="i32")
backend, arch, warp = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
for kernel, more in ((kernels._rows, {}), (kernels._pairs, pair)):
    for softcap in (0.0, 30.0):
        types = {"x": "*bf16", "label": "*i64", **numbers, **more}
        source = ASTSource(kernel, types, {"softcap": softcap, "BLOCK": 4096})
        print(kernel.__name__, triton.compile(source, target=target, options={"num_warps": 8}).asm["ttir"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "cuda 100 32", "hip gfx942 64"])
def test_they_compile_for_gpus_and_touch_a_logit_three_times(target):
    """Two loads and a store of bf16 for each logit of a row, or of a pair's two: six bytes a logit."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *target.split()], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, logits in (("_rows", 1), ("_pairs", 2)):
        compiled = [part for part in re.split(r"(?m)^(?=_rows|_pairs)", done.stdout) if part.startswith(name)]
        assert len(compiled) == 2
        for code in compiled:
            assert len(re.findall(r"tt\.load [^\n]*tensor<4096x!tt\.ptr<bf16>", code)) == 2 * logits
            assert len(re.findall(r"tt\.store [^\n]*tensor<4096x!tt\.ptr<bf16>", code)) == logits
