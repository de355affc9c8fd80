"""Edges of the loss: shapes, dtypes, empty inputs, chunks."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sftmix.functional import chunked_loss, default_chunk_size, fused, reference_sft_loss, sft_loss
from tests.functional.loss_checks import call, close, dft, make_case, same

# ------------------------------------------------------------------------------------------- small inputs


@pytest.mark.parametrize(("rows", "pairs"), [(0, 0), (1, 0), (5, 0), (1, 3)])
@pytest.mark.parametrize("stats", [False, True])
def test_empty_and_tiny_inputs_keep_the_graph(rows, pairs, stats):
    case = make_case(0, rows=rows, pairs=pairs)
    got = case.run(sft_loss, stats=stats, entropy=stats)
    same(got, case.run(reference_sft_loss, stats=stats, entropy=stats))
    assert got.result.loss.grad_fn is not None
    assert got.hidden is not None
    assert [got.result.correct is not None, got.result.entropy is not None] == [stats, stats]
    if rows == 0:
        assert got.result.loss.item() == 0.0
        assert float(got.weight.abs().sum()) == 0.0


def test_nll_is_the_plain_one_under_label_smoothing():
    case = make_case(2)
    plain, smooth = case.run(sft_loss).result, case.run(sft_loss, label_smoothing=0.3).result
    close(smooth.nll, plain.nll)
    close(smooth.mixup, plain.mixup)
    expected = torch.nn.functional.cross_entropy(
        case.hidden @ case.weight.T + case.bias, case.labels, label_smoothing=0.3, reduction="none"
    )
    close(smooth.loss, (case.row_weight * expected).sum() + (case.pair_weight * plain.mixup).sum())


def test_rule_sees_nll_and_entropy_without_a_graph():
    case = make_case(3)
    seen: list[tuple[bool, int]] = []

    def rule(nll, entropy):
        seen.append((nll.requires_grad or entropy.requires_grad, len(nll)))
        assert nll.shape == entropy.shape
        return nll.mul_(-1).exp_()  # even in place

    out = case.run(sft_loss, chunk_size=4)
    got = case.run(sft_loss, chunk_size=4, rule=rule)
    same(got, case.run(reference_sft_loss, rule=dft))
    close(got.result.nll, out.result.nll)
    assert seen
    assert not any(graph for graph, _ in seen)
    with pytest.raises(ValueError, match="one factor per row"):
        case.run(sft_loss, rule=lambda nll, entropy: nll.sum())


def test_correct_is_the_first_maximum():
    """Equal logits are common in bfloat16: only the argmax counts as a hit."""
    case = make_case(4, bias=False)
    case = replace(case, hidden=torch.zeros_like(case.hidden), labels=torch.arange(9) % 7)
    assert case.run(sft_loss).result.correct.tolist() == [y == 0 for y in case.labels.tolist()]


# ---------------------------------------------------------------------------------------------- dtypes


def test_statistics_are_float32_or_better():
    case = make_case(13)
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        h, w = (x.clone().to(dtype).requires_grad_() for x in (case.hidden, case.weight))
        out = call(case, h, w, bias=case.bias.to(dtype), stats=True)
        assert {out.loss.dtype, out.nll.dtype, out.mixup.dtype} == {expected}
        out.loss.backward()
        assert (h.grad.dtype, w.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 0.5, "label_smoothing": 0.1}])
def test_bf16_autocast_on_cpu(options):
    """Against float64: within what rounding the inputs of the matmuls to bfloat16 does to them."""
    case = make_case(14, rows=64, pairs=48, width=32, vocabulary=96)
    case = replace(case, hidden=case.hidden / 4)
    exact = replace(case, options=options).run(reference_sft_loss)
    h, w, b = (x.float().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(case, h, w, bias=b, chunk_size=16, **options)
    assert out.loss.dtype == out.nll.dtype == torch.float32
    (out.loss / 10).backward()
    assert h.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
    assert abs(out.loss.item() / exact.result.loss.item() - 1) < 1e-3
    for got, expected in ((h.grad, exact.hidden), (w.grad, exact.weight), (b.grad, exact.bias)):
        assert float((10 * got - expected).norm() / expected.norm()) < 0.02
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(case, h, w, bias=b, chunk_size=16, **options).nll, out.nll)


@pytest.mark.parametrize("tokens", [64, 2**16])
@pytest.mark.parametrize("kind", ["fused", "chunked"])
def test_small_gradients_survive_float16(kind, tokens):
    """Each token of a large global batch weighs little: its gradient would underflow before a GradScaler sees it."""
    case = make_case(14, rows=64, pairs=48, width=32, vocabulary=96)
    case = replace(case, hidden=case.hidden / 4, row_weight=case.row_weight / tokens)
    case = replace(case, pair_weight=case.pair_weight / tokens * (kind == "fused"))
    exact = case.run(reference_sft_loss)
    h, w, b = (x.float().requires_grad_() for x in (case.hidden, case.weight, case.bias))

    def nll(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    with torch.autocast("cpu", dtype=torch.float16):
        if kind == "fused":
            loss = call(case, h, w, bias=b, chunk_size=16).loss
        else:
            loss = chunked_loss(h, nll, case.labels, row_weight=case.row_weight, weight=w, bias=b, chunk_size=16).loss
    (loss * 2**16).backward()
    assert abs(loss.item() / exact.result.loss.item() - 1) < 1e-3
    for got, expected in ((h.grad, exact.hidden), (w.grad, exact.weight), (b.grad, exact.bias)):
        assert float((got / 2**16 - expected).norm() / expected.norm()) < 0.005


def test_autocast_reaches_the_matmuls_only():
    """With exact logits (an identity as hidden states), losses have float32's precision under autocast."""
    case = make_case(16, rows=32, pairs=20, width=32, vocabulary=200, bias=False)
    weight = case.weight.bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(case, torch.eye(32), weight, stats=True)
    exact = replace(case, hidden=torch.eye(32).double(), weight=weight.double()).run(reference_sft_loss).result
    for name in ("nll", "mixup"):
        close(getattr(out, name), getattr(exact, name), 2e-6)


def test_weight_gradient_is_summed_in_float32():
    """Many small chunks in bfloat16: summing those in bfloat16 would lose most of them."""
    rows, vocabulary = 512, 4
    h, w = torch.ones(rows, 1).bfloat16(), torch.zeros(vocabulary, 1).bfloat16().requires_grad_()
    none, labels = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    weights = {"row_weight": torch.ones(rows), "pair_weight": torch.zeros(0)}
    sft_loss(h, w, labels, none, torch.zeros(0), **weights, chunk_size=1).loss.backward()
    assert w.grad.flatten().tolist() == [-384.0, 128.0, 128.0, 128.0]


# ------------------------------------------------------------------------------------- chunks and checks


def test_rows_that_the_caller_knows_to_be_alone_change_nothing():
    case = make_case(15, rows=50, pairs=20)
    unpaired = fused.unpaired_rows(case.pairs, 50)
    assert 10 < len(unpaired) < 40
    for known in (unpaired, unpaired.flip(0)):
        same(case.run(sft_loss, unpaired=known), case.run(reference_sft_loss))


@pytest.mark.parametrize("chunk_size", [None, 9])
@pytest.mark.parametrize("height", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "label_smoothing": 0.1, "rule": dft}])
def test_the_blocks_of_a_chunk_change_nothing(options, height, chunk_size, monkeypatch):
    case = make_case(15, rows=30, pairs=11, **options)
    expected = case.run(reference_sft_loss)
    monkeypatch.setattr(fused, "CPU_BLOCK_CELLS", 7 * height)
    same(case.run(sft_loss, chunk_size=chunk_size), expected)


def test_the_blocks_of_a_chunk_change_no_bit_under_autocast(monkeypatch):
    """There the gradients of a block are copied back into the logits."""
    case = make_case(15, rows=30, pairs=11)
    case = replace(case, hidden=case.hidden.float(), weight=case.weight.float(), bias=case.bias.float())
    results = []
    for cells in (fused.CPU_BLOCK_CELLS, 7, 21):
        monkeypatch.setattr(fused, "CPU_BLOCK_CELLS", cells)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(case.run(sft_loss, entropy=True))
    one, *several = (tree_leaves([[*filter(torch.is_tensor, x.result)], x.hidden, x.weight, x.bias]) for x in results)
    assert all(torch.equal(a, b) for other in several for a, b in zip(one, other, strict=True))


def test_the_kernels_give_no_entropies_and_no_hits_beside_gradients():
    """There torch's passes compute them."""
    case = make_case(17)
    for trains, asked, fits in (
        (True, {"entropy": True}, False),
        (False, {"entropy": True}, False),
        (True, {"stats": True}, False),
        (False, {"stats": True}, True),
    ):
        one = fused.Pass(case.hidden.clone().requires_grad_(trains), case.weight, case.bias, **asked)
        assert one.fits_kernels(case.pairs[:0]) is fits


def test_a_masked_token_adds_nothing_to_an_entropy():
    """Its logit is -inf, and its share 0; a rule sees the same."""
    case = make_case(16, vocabulary=50)
    case = replace(case, labels=case.labels % 49).without_pairs(case.row_weight)
    case.bias[49] = -torch.inf
    seen: list[torch.Tensor] = []

    def rule(nll, entropy):
        seen.append(entropy)
        return torch.ones_like(nll)

    got = case.run(sft_loss, rule=rule, entropy=True, frozen=True)
    expected = torch.special.entr((case.hidden @ case.weight.T + case.bias).softmax(1)).sum(1)
    close(got.result.entropy, expected)
    close(torch.cat(seen).sort().values, expected.sort().values)
    same(got, case.run(reference_sft_loss, rule=rule, entropy=True, frozen=True))


def test_default_chunk_size_follows_the_vocabulary():
    sizes = [default_chunk_size(v, torch.device("cpu")) for v in (512, 49_152, 256_000, 10**9)]
    assert sizes == [4096, 682, 131, 64]
    sizes = [default_chunk_size(v, torch.device("cuda")) for v in (128_256, 151_936, 262_144)]
    assert sizes == [4096, 4096, 2560]


WRONG = [
    ({"labels": torch.tensor([0, 1, -100])}, ValueError, r"labels must lie in \[0, 7\), got -100 to 1"),
    ({"labels": torch.tensor([0, 1])}, ValueError, "hidden has shape"),
    ({"pairs": torch.tensor([[0, 3]])}, ValueError, r"pairs must lie in \[0, 3\)"),
    ({"pairs": torch.tensor([[0, 1, 2]])}, ValueError, "pairs has shape"),
    ({"pairs": torch.tensor([[0.0, 1.0]])}, IndexError, "must be long"),
    ({"lam": torch.tensor([0.5, 0.5])}, ValueError, "lam has shape"),
    ({"pair_weight": torch.tensor(0.5)}, ValueError, "pair_weight has shape"),
    ({"row_weight": torch.ones(2)}, ValueError, "row_weight has shape"),
    ({"bias": torch.zeros(3)}, ValueError, "bias has shape"),
    ({"softcap": 0.0}, ValueError, "softcap above 0"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing 1.0"),
    ({"chunk_size": 0}, ValueError, "chunk_size 0"),
    ({"bias": torch.zeros(7, dtype=torch.float64)}, ValueError, "of one floating dtype: cast them"),
    ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"int64, torch\.float32\], and must be of one"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_inputs_that_do_not_fit(change, error, message):
    case = make_case(0, rows=3, pairs=1, bias=False)
    arguments = {name: value for name, value in vars(case).items() if name not in ("bias", "options")}
    arguments |= {name: value.float() for name, value in arguments.items() if value.is_floating_point()}
    sft_loss(**arguments)
    with pytest.raises(error, match=message):
        sft_loss(**arguments | change)


class Reached(Exception):
    """The kernels were called."""


class Kernels:
    scale = torch.Tensor.mul_

    def differentiate(*given):
        raise Reached


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, True),
        ({"softcap": 30.0, "scale": 0.5}, True),
        ({"rule": dft}, False),
        ({"label_smoothing": 0.1}, False),
        ({"stats": True}, False),
    ],
)
def test_the_kernels_run_where_they_know_all_options(options, asked, monkeypatch):
    """They would leave the others out without a word."""
    monkeypatch.setattr(fused.Pass, "kernels", Kernels)
    with pytest.raises(Reached) if asked else contextlib.nullcontext():
        make_case(0).run(sft_loss, **{"stats": False} | options)


@pytest.mark.parametrize(
    ("pairs", "options", "asked"),
    [
        (0, {"stats": True}, True),
        (0, {}, True),
        (0, {"rule": dft}, False),
        (0, {"entropy": True}, False),
        (3, {"stats": True}, False),
    ],
)
def test_the_kernels_score_where_nothing_is_mixed(pairs, options, asked, monkeypatch):
    monkeypatch.setattr(fused.Pass, "kernels", Kernels)
    case = make_case(0, pairs=pairs)
    with torch.no_grad(), pytest.raises(Reached) if asked else contextlib.nullcontext():
        call(case, case.hidden, case.weight, **options)


def test_the_kernels_are_asked_for_on_a_gpu_and_not_in_float64(monkeypatch):
    """The tensors are on a GPU that is not there."""
    monkeypatch.setattr(fused, "working_kernels", lambda *given: given)
    with FakeTensorMode(), torch.device("cuda"):
        for dtype, device, asked in (
            (torch.bfloat16, "cuda", True),
            (torch.float64, "cuda", False),
            (None, "cpu", False),
        ):
            h, w = (torch.empty(n, 4, dtype=dtype, device=device) for n in (9, 7))
            assert fused.Pass(h, w, None, 30.0).kernels == ((h.device, dtype, 30.0) if asked else None)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_a_gpu(dtype, device):
    """float64: the reference to 1e-10. bfloat16: near it. Both: the same bits again."""
    case = make_case(17, rows=300, pairs=400, width=16, vocabulary=50)
    exact = case.run(reference_sft_loss)
    tensors = {k: v.to(device) for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    moved = replace(case, **tensors | {k: tensors[k].to(dtype) for k in ("hidden", "weight", "bias")})
    first, second = (moved.run(sft_loss, chunk_size=64) for _ in range(2))
    for name in ("hidden", "weight", "bias"):
        got, expected = getattr(first, name), getattr(exact, name)
        assert torch.equal(got, getattr(second, name))
        limit = 1e-10 if dtype == torch.float64 else 0.03
        assert float((got.cpu().double() - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_a_rule_multiplies_the_weights(chunk_size):
    """Equal to the specification, and to the same weights given as numbers; a row of weight 0 carries no NTP loss."""
    scale = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 2.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    case = replace(make_case(5), row_weight=scale)
    got = case.run(sft_loss, rule=dft, chunk_size=chunk_size)
    same(got, case.run(reference_sft_loss, rule=dft))
    numbers = torch.exp(-got.result.nll) * scale
    same(got, replace(case, row_weight=numbers).run(sft_loss))
    infinite = {"rule": lambda nll, entropy: torch.where(nll > -1, torch.inf, 0.0), "chunk_size": chunk_size}
    same(*(case.with_pairs_only().run(loss, **infinite) for loss in (sft_loss, reference_sft_loss)))
    none = case.with_pairs_only().run(sft_loss, **infinite)
    close(none.result.loss, (case.pair_weight * none.result.mixup).sum())
