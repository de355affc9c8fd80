"""Five wrong losses, each a mistake that has been made or is easy to make: the checks must tell every one of them."""

from dataclasses import replace

import pytest
import torch

from sftmix.functional import fused, sft_loss
from tests.functional.loss_checks import CHECKS, make_case

CHUNK = 4
CASE = make_case(11, rows=10, pairs=6, chunk_size=CHUNK)


def decomposed(hidden, weight, labels, pairs, lam, **kw):
    """lambda CE_c + (1 - lambda) CE_u of the unmixed predictions."""
    share = torch.stack([lam, 1 - lam], 1)
    extra = torch.zeros_like(kw["row_weight"]).index_add_(
        0, pairs.flatten(), (share * kw["pair_weight"][:, None]).flatten()
    )
    kw = kw | {"row_weight": kw["row_weight"] + extra, "pair_weight": lam[:0]}
    out = sft_loss(hidden, weight, labels, pairs[:0], lam[:0], **kw)
    return out._replace(mixup=(share * out.nll[pairs]).sum(1))


def one_side_detached(hidden, weight, labels, pairs, lam, **kw):
    """The unconfident side of the mixture gets no gradient."""
    zero = torch.zeros_like(kw["row_weight"])
    both = torch.cat([hidden, hidden.detach()])
    shifted = pairs + torch.tensor([0, len(labels)])
    kw = kw | {"row_weight": torch.cat([kw["row_weight"], zero])}
    out = sft_loss(both, weight, labels.repeat(2), shifted, lam, **kw)
    rows = slice(0, len(labels))
    return out._replace(nll=out.nll[rows], correct=out.correct[rows])


def last_chunk_dropped(hidden, *args, **kw):
    """Rows that do not fill a chunk are lost."""
    whole = len(hidden) - len(hidden) % kw["chunk_size"]
    weight = kw["row_weight"].clone()
    weight[whole:] = 0
    return sft_loss(hidden, *args, **kw | {"row_weight": weight})


def patched(change):
    """The shipped loss with another lambda handed to the soft target, and to it alone."""
    shipped = fused.Pass._mixup

    def run(*args, **kw):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused.Pass, "_mixup", lambda it, x, i, j, lam, out: shipped(it, x, i, j, change(lam), out))
            return sft_loss(*args, **kw)

    return run


lambda_swapped = patched(lambda lam: 1 - lam)
hard_label = patched(torch.round)

MUTANTS = {
    "decomposed": (decomposed, {"reference", "mixture", "label", "appendix_a"}),
    "lambda swapped in the labels": (lambda_swapped, {"reference", "endpoints", "label", "appendix_a"}),
    "one side detached": (one_side_detached, {"reference", "endpoints", "swap", "appendix_a"}),
    "last chunk dropped": (last_chunk_dropped, {"reference", "sum", "chunk_size", "permutation"}),
    "hard label": (hard_label, {"reference", "label", "appendix_a"}),
}


def kills(name, loss, case):
    try:
        CHECKS[name](loss, case)
    except AssertionError:
        return True
    return False


def killed_by(loss, case):
    return {name for name in CHECKS if kills(name, loss, case)}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    loss, expected = MUTANTS[name]

    def chunked(*args, **options):  # for the checks whose cases name no chunk size
        return loss(*args, **{"chunk_size": CHUNK} | options)

    assert killed_by(chunked, CASE) >= expected


def test_the_shipped_loss_survives():
    assert killed_by(sft_loss, CASE) == set()
    assert killed_by(sft_loss, replace(CASE, bias=None)) == set()
