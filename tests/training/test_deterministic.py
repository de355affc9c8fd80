"""`training.deterministic`: torch's deterministic algorithms, for the run alone."""

import os

import pytest
import torch
from torch.nn import attention

from sftmix.cli import main
from sftmix.components import NTP, SFTMix
from sftmix.ranks.world import World
from sftmix.training.loop import train
from sftmix.training.machine import WORKSPACE, adding_in_order, flash_kernels
from sftmix.training.scoring import Scorer
from sftmix.words.errors import ConfigError
from tests.tiny import metrics, weights
from tests.toy import metrics_of, toy_stage
from tests.training.test_step import DATA, UNITS


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setenv(WORKSPACE, "set by the test, so that it is taken back")
    monkeypatch.delenv(WORKSPACE)


class Seen(SFTMix):
    def loss(self, view, batch, plan):
        SEEN.append(torch.are_deterministic_algorithms_enabled())
        FILLED.append(torch.utils.deterministic.fill_uninitialized_memory)
        return super().loss(view, batch, plan)


class Breaks(NTP):
    def loss(self, view, batch, plan):
        raise RuntimeError("as an operation without a deterministic algorithm")


SEEN: list[bool] = []
FILLED: list[bool] = []
"""Whether memory is filled with NaN before it is used, for each."""


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("wanted", "on"), [("auto", None), (True, True), (False, False)])
def test_it_is_on_in_the_steps_and_set_back_after_them(wanted, on, before, tmp_path):
    """On a CPU the losses are the same, bit for bit."""
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        SEEN.clear()
        FILLED.clear()
        options = {"deterministic": wanted, "learning_rate": 0.01}
        train(toy_stage(tmp_path / "a", [UNITS] * 2, data=DATA, objective=Seen(), options=options), World())
        assert set(SEEN) == {before if on is None else on}
        assert set(FILLED) == {on is None}
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is before
        with pytest.raises(RuntimeError, match="as an operation"):
            train(toy_stage(tmp_path / "b", [UNITS], data=DATA, objective=Breaks(), options=options), World())
        assert torch.are_deterministic_algorithms_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)
    plain = toy_stage(tmp_path / "c", [UNITS] * 2, data=DATA, objective=SFTMix(), options={"learning_rate": 0.01})
    train(plain, World())
    losses = [[(m["loss"], m["grad_norm"]) for m in metrics_of(tmp_path / name)] for name in ("a", "c")]
    assert losses[0] == losses[1]


def test_cublas_is_given_memory_before_it_starts(monkeypatch):
    with adding_in_order("auto"), adding_in_order(False):
        assert WORKSPACE not in os.environ
    with adding_in_order(True):
        assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with adding_in_order(True):
        assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    error = "training.deterministic true needs the variable CUBLAS_WORKSPACE_CONFIG=:4096:8 before CUDA starts"
    with pytest.raises(ConfigError, match=error), adding_in_order(True):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.long
@pytest.mark.slow
def test_a_whole_run_is_deterministic_and_so_is_its_verification(plain, tmp_path, monkeypatch):
    """Scoring as well; on a CPU it is the run without the option."""
    seen, columns = [], Scorer.columns

    def noted(self, *given):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return columns(self, *given)

    monkeypatch.setattr(Scorer, "columns", noted)
    words = (*plain.options, "--training.max_steps", "4")
    for name, more in (("run", ("--training.deterministic", "true")), ("plain", ())):
        assert main(["run", *words, *more, "--out", str(tmp_path / name)]) == 0
        assert set(seen) == {bool(more)}
        assert not torch.are_deterministic_algorithms_enabled()
        seen.clear()
    assert main(["verify", str(tmp_path / "run"), "--from", "0"]) == 0
    assert set(seen) == {True}
    assert [m["loss"] for m in metrics(tmp_path / "run")] == [m["loss"] for m in metrics(tmp_path / "plain")]
    for name, one in weights(tmp_path / "run").items():
        assert torch.equal(one, weights(tmp_path / "plain")[name])


# ---------------------------------------------------------------------------------------------------- flash kernels


def test_flash_attention_3_is_refused_where_it_is_not():
    with flash_kernels("torch", torch.device("cpu")):
        pass
    with (
        pytest.raises(ConfigError, match=r"training\.flash_kernels FA3 needs .*here: cpu"),
        flash_kernels("FA3", torch.device("cpu")),
    ):
        pass


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (10, 0)])
def test_flash_attention_3_is_there_while_a_stage_trains(capability, monkeypatch):
    """By torch's own switch, with a stand-in for the package's kernels, and for the question to the GPU."""
    seen = []

    class Handle:
        def remove(self):
            seen.append("removed")

    def register():
        seen.append("registered")
        return Handle()

    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    if capability[0] != 9:
        with pytest.raises(ConfigError, match="here: cuda"), flash_kernels("FA3", cuda):
            pass
        assert seen == []
        return

    def fails():
        with flash_kernels("FA3", cuda):
            assert seen == ["registered"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == ["registered", "removed"]
    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: seen.index("no such package"))
    with pytest.raises(ConfigError, match="not in list"), flash_kernels("FA3", cuda):
        pass
