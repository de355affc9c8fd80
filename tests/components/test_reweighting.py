"""Label smoothing and IR-DRO: what they refuse. Their formulas: tests/training/test_objectives.py."""

import pytest

from sftmix.common.errors import ConfigError
from sftmix.components import IRDRO, LabelSmoothing, Need


def test_an_epsilon_that_is_no_share_is_refused():
    for epsilon in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=rf"objective\.epsilon is {epsilon}; allowed: from 0 to below 1"):
            LabelSmoothing(epsilon=epsilon)


def test_irdro_needs_the_losses_of_its_batch():
    assert IRDRO.needs == {Need.BATCH_NLL}
    for tau in (0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match=rf"objective\.tau is {tau}; allowed: a number above 0"):
            IRDRO(tau=tau)
