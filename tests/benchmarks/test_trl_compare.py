"""The race beside TRL: its summary with and without held-out rows."""

import pytest

from benchmarks.trl_compare import against, summary

STEPS = [{"seconds": 2.0, "cpu_seconds": 3.0}, {"seconds": 2.0, "cpu_seconds": 3.0}]
FIGURES = {"tokens": 80, "slots": 100, "peak_mib_above_the_loaded_model": 5.0, "peak_mib": 9.0}


@pytest.mark.parametrize("nlls", [{}, {"train_nll": 1.5, "held_out_nll": 2.5}])
def test_the_nlls_are_there_if_rows_were_held_out(nlls):
    found = {name: summary(STEPS, FIGURES | nlls, 1) for name in ("ours_sftmix", "trl_best")}
    assert found["trl_best"]["real_tokens_per_second"]["median"] == 20.0
    assert {name: value for name, value in found["trl_best"].items() if name.endswith("nll")} == nlls
    made = against("ours_sftmix", "trl_best", dict.fromkeys(found, STEPS), found, 1)
    assert made["speed by seconds"]["median"] == 1.0
    assert {name for name in made if name.endswith("nll")} == nlls.keys()
