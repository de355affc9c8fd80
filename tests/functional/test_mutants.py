"""Six wrong losses, each a mistake that has been made or is easy to make: the checks must tell every one of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix.functional import SFTLoss, fused, sft_loss
from tests.functional.loss_checks import CHECKS, Case, Loss, make_case

CHUNK = 4
CASE = make_case(11, rows=10, pairs=6, chunk_size=CHUNK)


def decomposed(hidden: Tensor, weight: Tensor, labels: Tensor, pairs: Tensor, lam: Tensor, **kw: Any) -> SFTLoss:
    """lambda CE_c + (1 - lambda) CE_u of the unmixed predictions."""
    share = torch.stack([lam, 1 - lam], 1)
    extra = torch.zeros_like(kw["row_weight"]).index_add_(
        0, pairs.flatten(), (share * kw["pair_weight"][:, None]).flatten()
    )
    kw = kw | {"row_weight": kw["row_weight"] + extra, "pair_weight": lam[:0]}
    out = sft_loss(hidden, weight, labels, pairs[:0], lam[:0], **kw)
    return out._replace(mixup=(share * out.nll[pairs]).sum(1))


def one_side_detached(hidden: Tensor, weight: Tensor, labels: Tensor, pairs: Tensor, lam: Tensor, **kw: Any) -> SFTLoss:
    """The unconfident side of the mixture gets no gradient."""
    zero = torch.zeros_like(kw["row_weight"])
    both = torch.cat([hidden, hidden.detach()])
    shifted = pairs + torch.tensor([0, len(labels)])
    kw = kw | {"row_weight": torch.cat([kw["row_weight"], zero])}
    out = sft_loss(both, weight, labels.repeat(2), shifted, lam, **kw)
    rows = slice(0, len(labels))
    return out._replace(nll=out.nll[rows], correct=out.correct[rows], entropy=out.entropy[rows])


def last_chunk_dropped(hidden: Tensor, *args: Tensor, **kw: Any) -> SFTLoss:
    """Rows that do not fill a chunk are lost."""
    whole = len(hidden) - len(hidden) % kw["chunk_size"]
    weight = kw["row_weight"].clone()
    weight[whole:] = 0
    return sft_loss(hidden, *args, **kw | {"row_weight": weight})


def mean_of_chunk_means(hidden: Tensor, *args: Tensor, **kw: Any) -> SFTLoss:
    """Every chunk counts the same, however many rows it has (here rescaled to the sum)."""
    rows, size = len(hidden), kw["chunk_size"]
    lengths = torch.tensor([min(size, rows - t // size * size) for t in range(rows)], dtype=torch.float64)
    chunks = -(-rows // size)
    return sft_loss(hidden, *args, **kw | {"row_weight": kw["row_weight"] * rows / (chunks * lengths)})


def patched(change: Callable[..., tuple[Any, ...]]) -> Loss:
    """The shipped loss with other labels or another lambda handed to the soft target, and to it alone."""
    shipped = fused._mixup

    def run(*args: Any, **kw: Any) -> SFTLoss:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "_mixup", lambda x, i, j, mixed, *rest: shipped(x, *change(i, j, mixed), *rest))
            return sft_loss(*args, **kw)

    return run


lambda_swapped = patched(lambda i, j, mixed: (i, j, mixed._replace(lam=1 - mixed.lam)))
hard_label = patched(lambda i, j, mixed: (i, j, mixed._replace(lam=mixed.lam.round())))

MUTANTS: dict[str, tuple[Loss, set[str]]] = {
    "decomposed": (decomposed, {"reference", "mixture", "label", "appendix_a"}),
    "lambda swapped in the labels": (lambda_swapped, {"reference", "endpoints", "label", "appendix_a"}),
    "one side detached": (one_side_detached, {"reference", "endpoints", "swap", "appendix_a"}),
    "last chunk dropped": (last_chunk_dropped, {"reference", "sum", "chunk_size", "permutation"}),
    "mean of chunk means": (mean_of_chunk_means, {"reference", "sum", "chunk_size", "permutation"}),
    "hard label": (hard_label, {"reference", "label", "appendix_a"}),
}


def kills(name: str, loss: Loss, case: Case) -> bool:
    try:
        CHECKS[name](loss, case)
    except AssertionError:
        return True
    return False


def killed_by(loss: Loss, case: Case) -> set[str]:
    return {name for name in CHECKS if kills(name, loss, case)}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    loss, expected = MUTANTS[name]
    # for the checks whose cases name no chunk size
    wrapped: Loss = lambda *a, **k: loss(*a, **{"chunk_size": CHUNK} | k)  # noqa: E731
    assert killed_by(wrapped, CASE) >= expected


def test_the_shipped_loss_survives():
    assert killed_by(sft_loss, CASE) == set()
    assert killed_by(sft_loss, replace(CASE, bias=None)) == set()
