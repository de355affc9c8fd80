"""A line about steps that are five times slower than before, for a minute: once, and about nothing else."""

import time

import pytest
import torch

from sftmix.ranks.world import World
from sftmix.training import pace
from sftmix.training.loop import train
from sftmix.training.pace import Pace
from tests.toy import toy_stage
from tests.training.loop_claims import BATCHES, DATA


def lines(steps: list[tuple[int, float]], kind: str = "cpu") -> list[int]:
    """The numbers of the steps, of so many tokens and seconds, after which a line is due."""
    one = Pace(torch.device(kind))
    return [number for number, step in enumerate(steps, start=1) if one.after(*step)]


@pytest.mark.parametrize(
    ("steps", "due"),
    [
        ([(100, 1.0)] * 100 + [(100, 5.0)] * 30, [112]),  # a minute of steps at a fifth of the rate
        ([(100, 1.0)] * 100 + [(100, 4.9)] * 60, []),
        ([(100, 1.0)] * 100 + [(100, 6.0)] * 9 + [(100, 1.0)] * 20 + [(100, 6.0)] * 9, []),  # twice 54 s
        ([(100, 1.0)] * 100 + [(1000, 10.0)] * 40, []),  # longer steps, at the same rate
        ([(100, 20.0)] * 100, []),  # slow from the start
        ([(100, 1.0)] * 100 + [(100, 90.0)], [101]),
        (([(100, 1.0)] * 100 + [(100, 50.0)] * 4) * 2, [102]),  # once
    ],
)
def test_a_line_is_due_once_after_a_slow_minute(steps, due):
    assert lines(steps) == due
    assert lines(steps, "cuda") == []


def test_the_loop_says_it(tmp_path, monkeypatch, capsys):
    """Steps that take a twentieth of a second more from the third on, where a window is of no length."""
    monkeypatch.setattr(pace, "WINDOW", 0.0)
    monkeypatch.setattr(pace, "LASTS", 0.4)
    monkeypatch.setattr(pace, "FELL", 1.5)
    stage = toy_stage(tmp_path, BATCHES[:1] * 6, data=DATA, options={"micro_batch_size": 64})
    plan, calls = stage.objective.plan, []

    def slow(*given, **more):
        calls.append(given)
        time.sleep(0.0 if len(calls) < 4 else 0.4)
        return plan(*given, **more)

    stage.objective.plan = slow
    train(stage, World())
    said = [line for line in capsys.readouterr().out.splitlines() if "tokens a second for a minute" in line]
    assert len(said) == 1
    assert "OMP_NUM_THREADS=1" in said[0]
