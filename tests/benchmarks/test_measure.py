"""The clock and the power of a card, from a program that writes what `nvidia-smi` writes."""

import time
from types import SimpleNamespace

import torch

from benchmarks.measure import Card, in_turns

NVIDIA_SMI = """#!/bin/sh
while true; do
    echo "[N/A], 400"
    echo "$(cat clock), 650.5"
    sleep 0.01
done
"""


def test_each_turn_has_its_own_clock_and_power(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "clock").write_text("1980")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    with Card("cuda") as card:
        for turn, clock in (("one", "1980"), ("other", "1485")):
            (tmp_path / "clock").write_text(clock)
            time.sleep(0.1)
            card.turn = turn
            for _ in range(300):
                time.sleep(0.01)
                if card.figures(turn).get("mhz") == float(clock):
                    break
            card.turn = None
    assert card.figures("one") == {"mhz": 1980.0, "watts": 650.5}
    assert card.figures("other") == {"mhz": 1485.0, "watts": 650.5}
    assert card.figures("nobody") == {}


def test_a_cpu_has_none():
    with Card("cpu") as card:
        card.turn = "one"
    assert card.figures("one") == {}


def test_each_has_a_turn_in_each_round_in_an_order_of_chance_that_is_always_the_same():
    who = {name: lambda name=name: name for name in "abcd"}
    turns = [(number, name, result) for number, name, result, _ in in_turns(who, Card("cpu"), 5)]
    assert turns == [(number, name, result) for number, name, result, _ in in_turns(who, Card("cpu"), 5)]
    rounds = ["".join(name for number, name, _ in turns if number == k) for k in range(5)]
    assert {"".join(sorted(order)) for order in rounds} == {"abcd"}
    assert len({*rounds}) > 1
    assert all(name == result for _, name, result in turns)
    for _, name, _, _ in in_turns(who, Card("cpu")):  # to the last one
        del who[name]
