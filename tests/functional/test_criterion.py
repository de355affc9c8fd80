"""SFTMixLoss, the criterion: it is sft_loss with the paper's means, with torch alone, whatever is around it."""

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from sftmix.functional import SFTMixLoss, aligned_pairs, reference_sft_loss
from tests.forked import on_ranks

PAIRS = torch.tensor([[0, 1], [3, 2]])
LAM = torch.tensor([0.3, 0.9], dtype=torch.float64)


def padded(dtype=torch.float64):
    """hidden [5, 9, 8], weight [23, 8], labels [5, 9] with 3, 5, 1, 8 and 2 of them; the last is unpaired."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=random).to(dtype).requires_grad_() for shape in ((5, 9, 8), (23, 8))
    )
    labels = torch.full((5, 9), -100)
    for slot, (start, end) in enumerate(((4, 7), (1, 6), (8, 9), (1, 9), (5, 7))):
        labels[slot, start:end] = torch.randint(23, (end - start,), generator=random)
    return hidden, weight, labels


def value_and_gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(("mean", "mixed"), [("own", 4), ("ntp", 19)])
def test_it_is_the_formula_with_the_papers_means(mean, mixed):
    hidden, weight, labels = padded()
    at = (labels != -100).nonzero()
    rows, y = hidden[at[:, 0], at[:, 1] - 1], labels[at[:, 0], at[:, 1]]
    by_hand = torch.tensor([[0, 3], [1, 4], [2, 5], [9, 8]])  # 3 of 3 and 5; 1 of 8 and 1
    lam = LAM[[0, 0, 0, 1]]
    weights = {"row_weight": torch.full((19,), 1 / 19), "pair_weight": torch.full((4,), 0.5 / mixed)}
    naive = reference_sft_loss(rows, weight, y, by_hand, lam, **weights)
    out = SFTMixLoss(0.5, mean)(hidden, weight, labels, PAIRS, LAM)
    assert torch.equal(aligned_pairs(labels, PAIRS)[0], by_hand)
    for ours, theirs in zip(
        value_and_gradients(out.loss, hidden, weight), value_and_gradients(naive.loss, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    at_zero = SFTMixLoss(0.0, mean)(hidden, weight, labels, PAIRS, LAM)
    torch.testing.assert_close(at_zero.loss, naive.nll.mean())
    assert len(at_zero.mixup) == 0


@pytest.mark.parametrize("mean", ["own", "ntp"])
def test_micro_batches_with_the_counts_of_all_are_the_whole(mean):
    """The last holds no response token."""
    hidden, weight, labels = padded()
    labels[4], loss = -100, SFTMixLoss(0.5, mean)
    whole = loss(hidden, weight, labels, PAIRS, LAM).loss
    cut = ((slice(2), PAIRS[:1], LAM[:1]), (slice(2, 4), PAIRS[:1].flip(1), LAM[1:]), (slice(4, 5), PAIRS[:0], LAM[:0]))
    parts = [loss(hidden[at], weight, labels[at], pairs, lam, torch.tensor(17), 4).loss for at, pairs, lam in cut]
    for ours, theirs in zip(
        value_and_gradients(sum(parts), hidden, weight), value_and_gradients(whole, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:0]])
@pytest.mark.parametrize(("counts", "mean"), [((17, None), "own"), ((None, 4), "own"), ((None, 4), "ntp")])
def test_one_count_alone_is_refused(counts, mean, pairs):
    """As transformers' Trainer gives only num_items_in_batch: with pairs or none, so that the first call says it."""
    hidden, weight, labels = padded()
    told = f"num_items_in_batch is {counts[0]} and num_pairs_in_batch is {counts[1]}: .* Give both"
    with pytest.raises(ValueError, match=told):
        SFTMixLoss(0.5, mean)(hidden, weight, labels, pairs, LAM[: len(pairs)], *counts)


@pytest.mark.parametrize(("mu", "mean"), [(0.0, "own"), (0.5, "ntp")])
def test_if_pairs_are_not_counted_the_items_are_enough(mu, mean):
    hidden, weight, labels = padded()
    whole = SFTMixLoss(mu, mean)(hidden, weight, labels, PAIRS, LAM).loss
    half = SFTMixLoss(mu, mean)(hidden, weight, labels, PAIRS, LAM, 2 * 19).loss
    torch.testing.assert_close(2 * half, whole)


def call(kind):
    """The loss in float32 and its gradients, as a training loop of this kind has them."""
    hidden, weight, labels = padded(torch.float32)
    loss, lam = SFTMixLoss(0.5), LAM.float()

    def value(hidden, weight):
        return loss(hidden, weight, labels, PAIRS, lam).loss

    around = {"compile": torch.compile(value, backend="aot_eager")}
    around |= {"checkpointing": partial(checkpoint, value, use_reentrant=False)}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=kind == "scaler")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        scaled = scaler.scale(around.get(kind, value)(hidden, weight))
    return [found / scaler.get_scale() for found in value_and_gradients(scaled, hidden, weight)]


@pytest.mark.parametrize(
    ("kind", "within"),
    [
        pytest.param("compile", 0.0, marks=pytest.mark.slow),
        ("checkpointing", 0.0),
        ("scaler", 0.0),
        ("autocast", 2e-2),
    ],
)
@pytest.mark.filterwarnings("ignore")  # dynamo's own, of what it reads
def test_what_is_around_it_changes_nothing(kind, within):
    """Under autocast the matmuls are in bfloat16; all else stays in float32."""
    for ours, plain in zip(call(kind), call("plain"), strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=within, atol=within * 0.1)


def check_sharded(world):
    """The weight is a DTensor, and each rank has rows of its own: the gradient is the mean of the ranks' gradients."""
    hidden, weight, labels = padded()
    ranks = [hidden, -hidden]
    whole = [value_and_gradients(SFTMixLoss()(h, weight, labels, PAIRS, LAM).loss, weight)[1] for h in ranks]
    shard = distribute_tensor(weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    SFTMixLoss()(ranks[world.rank], shard, labels, PAIRS, LAM).loss.backward()
    torch.testing.assert_close(shard.grad.full_tensor(), (whole[0] + whole[1]) / 2)
    assert shard.grad.placements == (Shard(0),)


@pytest.mark.slow
def test_a_sharded_weight_has_the_mean_of_the_ranks_gradients():
    on_ranks(check_sharded)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"mu": -1.0}, "mu is -1.0; allowed: 0 and above"),
        ({"mu": float("nan")}, "mu is nan"),
        ({"pairs": torch.tensor([[0, -1], [3, 2]])}, r"pairs must lie in \[0, 5\), got -1 to 3"),
        (
            {"pairs": torch.tensor([[0, 5], [3, 2]])},
            r"pairs must lie in \[0, 5\), got 0 to 5: .* several documents, call align",
        ),
        ({"lam": torch.tensor([0.3, 0.9, 0.5])}, "lam has 3 shares for 2 pairs"),
        ({"lam": torch.tensor([0.3, 0.9], requires_grad=True)}, "lam would get no gradient: .* detach them"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, told):
    hidden, weight, labels = padded()
    with pytest.raises(ValueError, match=told):
        SFTMixLoss(inputs.get("mu", 0.5))(hidden, weight, labels, inputs.get("pairs", PAIRS), inputs.get("lam", LAM))


def test_states_and_a_head_of_two_dtypes_need_autocast():
    """As of a model in bfloat16 with a head in float32."""
    hidden, weight, labels = padded(torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    with pytest.raises(ValueError, match=r"of \[torch\.bfloat16, torch\.float32\], .* call the loss inside autocast"):
        SFTMixLoss(0.5)(low, weight, labels, PAIRS, LAM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, whole = (SFTMixLoss(0.5)(h, weight, labels, PAIRS, LAM).loss for h in (low, hidden))
    torch.testing.assert_close(mixed, whole)  # autocast rounds the float32 states to the same numbers


def test_another_mean_is_refused():
    with pytest.raises(ValueError, match="allowed: own, ntp"):
        SFTMixLoss(0.2, "all")
