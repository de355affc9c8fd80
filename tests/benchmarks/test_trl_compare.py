"""The race beside TRL: its summary with and without held-out rows."""

from argparse import Namespace

import pytest

from benchmarks import contestants
from benchmarks.trl_compare import against, summary

STEPS = [{"seconds": 2.0, "cpu_seconds": 3.0}, {"seconds": 2.0, "cpu_seconds": 3.0}]
FIGURES = {"tokens": 80, "slots": 100, "peak_mib_above_the_loaded_model": 5.0, "peak_mib": 9.0, "losses": {10: 2.0}}


@pytest.mark.parametrize("nlls", [{}, {"train_nll": 1.5, "held_out_nll": 2.5}])
def test_the_nlls_are_there_if_rows_were_held_out(nlls):
    found = {name: summary(STEPS, FIGURES | nlls, 1) for name in ("ours_sftmix", "trl_best")}
    assert found["trl_best"]["real_tokens_per_second"]["median"] == 20.0
    assert {name: value for name, value in found["trl_best"].items() if name.endswith("nll")} == nlls
    made = against("ours_sftmix", "trl_best", dict.fromkeys(found, STEPS), found, 1)
    assert made["speed by seconds"]["median"] == 1.0
    assert {name for name in made if name.endswith("nll")} == nlls.keys()


def test_a_contestant_that_cannot_run_here_is_named_with_what_it_needs(monkeypatch):
    monkeypatch.setattr(contestants, "find_spec", lambda package: None)
    cpu, gpu = Namespace(device="cpu"), Namespace(device="cuda")
    assert contestants.missing("trl_liger", cpu) == "needs a GPU"
    assert contestants.missing("trl_liger", gpu) == "needs flash_attn and liger_kernel"
    assert [contestants.missing(name, gpu) for name in ("trl_default", "ours_ntp")] == [None, None]
    monkeypatch.setattr(contestants, "find_spec", lambda package: package)
    assert contestants.missing("trl_liger", gpu) is None
