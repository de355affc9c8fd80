"""Label smoothing and IR-DRO: what they refuse. Their formulas: tests/training/test_objectives.py."""

from dataclasses import replace

import pytest
import torch

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.errors import ConfigError
from sftmix.components import IRDRO, LabelSmoothing, Need
from sftmix.types import BatchNLL
from tests.toy import toy_rows

AT = {"step": 3, "total_steps": 10, "seed": 7}


def test_an_epsilon_that_is_no_share_is_refused():
    for epsilon in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=rf"objective\.epsilon is {epsilon}; allowed: from 0 to below 1"):
            LabelSmoothing(epsilon=epsilon)


def test_irdro_needs_the_losses_of_its_batch():
    assert IRDRO.needs == {Need.BATCH_NLL}
    batch = collate([(Slot(4),), (Slot(2),)], toy_rows([(3, 2)] * 5))
    with pytest.raises(ConfigError, match=r"batch\.batch_nll is None"):
        IRDRO().plan(batch, **AT)
    other = BatchNLL(torch.tensor([2, 3]), torch.tensor([1.0, 1.0]), torch.tensor([1, 1]))
    with pytest.raises(ConfigError, match="does not hold all examples"):
        IRDRO().plan(replace(batch, batch_nll=other), **AT)
    for tau in (0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match=rf"objective\.tau is {tau}; allowed: a number above 0"):
            IRDRO(tau=tau)
