"""Gradients of the loss: autograd's corners, what is written and how often, memory, repeatability."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftmix.functional import reference_sft_loss, sft_loss
from tests.functional.loss_checks import call, close, make_case, same


class Largest(TorchDispatchMode):
    """The largest storage any operation returns, in elements, the inputs' own aside."""

    def __init__(self, *inputs: torch.Tensor):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_repeats_bit_for_bit():
    case = make_case(6, rows=300, pairs=400, width=16, vocabulary=50)
    case = replace(case, hidden=case.hidden.float(), weight=case.weight.float(), bias=None)
    first, *others = [case.run(sft_loss, chunk_size=64) for _ in range(5)]
    for other in others:
        assert torch.equal(other.result.loss, first.result.loss)
        assert torch.equal(other.hidden, first.hidden)
        assert torch.equal(other.weight, first.weight)


def test_second_derivative_raises():
    case = make_case(7)
    h, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    for inputs in ((h,), (w,), (h, w)):
        loss = call(case, h, w).loss
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, inputs, create_graph=True)


def test_a_scaled_loss_has_scaled_gradients_whether_or_not_its_graph_is_kept():
    case = make_case(8)
    once = case.run(sft_loss)
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = call(case, *inputs[:2], bias=inputs[2]).loss
    done = 0.0
    for scale, keep in ((3.0, True), (-0.5, True), (0.0, True), (7.0, False)):
        (scale * loss).backward(retain_graph=keep)
        done += scale
        for x, expected in zip(inputs, (once.hidden, once.weight, once.bias), strict=True):
            close(x.grad, done * expected)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


def test_a_gradient_of_a_kept_graph_is_a_copy():
    case = make_case(8)
    w = case.weight.clone().requires_grad_()
    loss = call(case, case.hidden, w).loss
    first, second = (torch.autograd.grad(loss, w, retain_graph=True)[0].mul_(2) for _ in range(2))
    close(first, second)


def test_frozen_inputs_get_nothing():
    case = make_case(9)
    whole, h, w = case.run(sft_loss), case.hidden.clone(), case.weight.clone()
    assert not call(case, h, w).loss.requires_grad
    for trained, frozen, expected in ((h, w, whole.hidden), (w, h, whole.weight)):
        trained.requires_grad_()
        call(case, h, w).loss.backward()
        close(trained.grad, expected)
        assert frozen.grad is None
        trained.requires_grad_(False).grad = None


@pytest.mark.parametrize("graph", ["no_grad", "inference_mode", "enabled", "frozen head"])
def test_nothing_large_is_ever_allocated(graph):
    """No [T, V] logits; without gradients nothing of the head's size [V, D] either, though it requires grad."""
    rows, width, vocabulary, chunk = 64, 24, 80, 8
    case = make_case(10, rows=rows, pairs=20, width=width, vocabulary=vocabulary, bias=False)
    h, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(graph != "frozen head")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(graph, torch.enable_grad)
    with context(), Largest(h, w) as largest:
        out = call(case, h, w, chunk_size=chunk, stats=True)
    assert out.loss.requires_grad is (graph in ("enabled", "frozen head"))
    head = vocabulary * width
    assert largest.elements < rows * vocabulary
    if graph == "enabled":
        assert largest.elements == head  # the weight's gradient
    elif graph == "frozen head":
        assert largest.elements == rows * width  # the hidden states' gradient
    else:
        assert largest.elements < head


@pytest.mark.parametrize("loss", [sft_loss, reference_sft_loss])
@pytest.mark.parametrize("name", ["lam", "row_weight", "pair_weight"])
def test_a_constant_that_asks_for_a_gradient_is_refused(loss, name):
    """It would get none, without a word: a weight of softmax(nll), say, would be trained as if it were detached."""
    case = make_case(3)
    learnt = replace(case, **{name: getattr(case, name).clone().requires_grad_()})
    with pytest.raises(ValueError, match=f"{name} would get no gradient: .*; detach them"):
        learnt.run(loss)
    with torch.no_grad():
        found = call(learnt, case.hidden, case.weight, loss=loss)
    close(found.loss, case.run(loss).result.loss.detach())


def test_no_second_weight_gradient_in_backward():
    case = make_case(12)
    h, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    for scale in (1 / 7, 1):
        w.grad = None
        loss = call(case, h, w).loss
        made = loss.grad_fn.gradients[1].data_ptr()
        (loss * scale).backward()
        assert w.grad.data_ptr() == made


class Written(TorchDispatchMode):
    """The operations that return a tensor of one shape, in order."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if any(isinstance(x, torch.Tensor) and x.shape == self.shape for x in tree_leaves(out)):
            self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize(("upstream", "scaling"), [(1.0, []), (0.5, ["mul_"])])
@pytest.mark.parametrize(("chunk_size", "chunks"), [(100, 1), (20, 3)])
def test_the_weight_gradient_is_written_once_for_each_chunk_and_nothing_else(chunk_size, chunks, upstream, scaling):
    """No zeros, no sum with them, no multiplication by 1: each is a pass over [V, D]."""
    case = make_case(15, rows=50, pairs=3, width=3, bias=False)
    h, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with Written(w.shape) as written:
        (upstream * call(case, h, w, chunk_size=chunk_size).loss).backward()
    assert [name for name in written.names if name != "detach"] == ["empty_like", *["addmm_"] * chunks, *scaling]


@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 12])
def test_a_gradient_that_is_written_has_no_uninitialised_value(rows, repeats, chunk_size):
    """In this mode torch fills new memory with NaN."""
    case = make_case(18, rows=rows, pairs=5)
    if not repeats:
        pairs = torch.randperm(rows)[: rows // 2 * 2].view(-1, 2)[:5]
        case = replace(case, pairs=pairs, lam=case.lam[: len(pairs)], pair_weight=case.pair_weight[: len(pairs)])
    expected = case.run(reference_sft_loss)
    torch.use_deterministic_algorithms(True)
    try:
        same(case.run(sft_loss, chunk_size=chunk_size), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_a_bf16_weight_has_a_bf16_gradient_if_there_is_one_chunk(upstream, scale):
    """No float32 of its size; each entry is as near the exact one as the gradients of the logits, in bf16, allow."""
    case = make_case(19, rows=40, pairs=10, width=6, vocabulary=30, bias=False, scale=scale)
    half = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    exact = replace(half, hidden=half.hidden.double(), weight=half.weight.double()).run(reference_sft_loss)
    for chunk_size, kind in ((None, torch.bfloat16), (13, torch.float32)):
        h, w = half.hidden.clone().requires_grad_(), half.weight.clone().requires_grad_()
        loss = call(half, h, w, scale=scale, chunk_size=chunk_size).loss
        assert loss.grad_fn.gradients[1].dtype == kind
        (upstream * loss).backward()
        assert w.grad.dtype == torch.bfloat16
        for got, expected in ((h.grad, exact.hidden), (w.grad, exact.weight)):
            assert float((got.double() / upstream - expected).norm() / expected.norm()) < 2**-7
