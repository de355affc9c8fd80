"""A line about steps that are five times slower than before, for a minute: once, and about nothing else."""

import re
import time

import psutil
import pytest
import torch

from sftmix.ranks.world import World
from sftmix.training import pace
from sftmix.training.loop import train
from sftmix.training.pace import Pace
from tests.toy import toy_stage
from tests.training.loop_claims import BATCHES, DATA


def lines(steps: list[tuple[int, float]], kind: str = "cpu") -> list[int]:
    """The numbers of the steps, of so many tokens and seconds, after which a line is due on one of two ranks."""
    one = Pace(World(size=2, device=torch.device(kind)), None)
    return [number for number, step in enumerate(steps, start=1) if one.after(*step)]


def children() -> set[psutil.Process]:
    """Also those of other tests, as the server that forks ranks."""
    return {*psutil.Process().children(recursive=True)}


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


@pytest.mark.slow
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
    before = children()
    train(stage, World())
    said = [line for line in capsys.readouterr().out.splitlines() if "tokens a second for a minute" in line]
    assert len(said) == 1
    assert re.search(r"(of a second was \d+\.\d times as fast with OMP_|was not much faster with other)", said[0])
    assert children() <= before


@pytest.mark.slow
def test_a_probe_computes_with_each_setting(monkeypatch):
    """Each child says how many threads it has, and how they wait, in place of its products."""
    shown = "print('ready', flush=True); import os, torch; sys.stdin.readline()"
    shown += "; print(10 * torch.get_num_threads() + (os.environ.get('OMP_WAIT_POLICY') == 'PASSIVE'))"
    monkeypatch.setattr(pace, "_PROBE", f"import sys; {shown}")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert pace.probe(64) == {"": 20, "OMP_NUM_THREADS": 10, "OMP_WAIT_POLICY": 21}


@pytest.mark.slow
def test_a_probe_ends_in_time_and_leaves_no_process(monkeypatch):
    monkeypatch.setattr(pace, "LONGEST", 0.2)
    started, before = time.monotonic(), children()
    assert pace.probe(64) == {}
    assert time.monotonic() - started < 5
    assert children() <= before


@pytest.mark.parametrize(
    ("products", "said"),
    [
        ({"": 10, "OMP_NUM_THREADS": 34, "OMP_WAIT_POLICY": 20}, "3.4 times as fast with OMP_NUM_THREADS=1 in"),
        ({"": 10, "OMP_NUM_THREADS": 5, "OMP_WAIT_POLICY": 20}, "2.0 times as fast with OMP_WAIT_POLICY=PASSIVE in"),
        ({"": 10, "OMP_NUM_THREADS": 11, "OMP_WAIT_POLICY": 9}, "not much faster with other settings of threads"),
        ({"": 10}, "faster with OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE in"),
        ({"OMP_NUM_THREADS": 5}, "faster with OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE in"),
    ],
)
def test_the_fastest_setting_is_named(products, said):
    assert said in pace.advice(products)
