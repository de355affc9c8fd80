"""Whole commands on a device that is not the CPU: the same numbers, and the same answers."""

import json

import pytest
import torch

from tests.device.sim import begin
from tests.forked import ended
from tests.tiny import Tiny, groups, make_tiny, metrics, weights

# The CPU's layout of a micro-batch, so that sums are made in the same order.
FEW = ("--training.max_steps", "4", "--checkpoint.every", "2", "--training.length_groups", "1")


def on_sim() -> None:
    begin()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("device"), dropout=0.0)


def run(tiny: Tiny, fault, *words: str) -> None:
    it = ended(words, cwd=tiny.model.parent, faults=[fault])
    assert it.code == 0, it.printed


@pytest.mark.slow
def test_a_run_and_its_answers(tiny):
    """Reference, scores, split, training with noise, checkpoints, export; then drawn answers of one exported model."""
    runs = {}
    for name, fault in (("cpu", None), ("sim", on_sim)):
        path = runs[name] = tiny.model.parent / name
        run(tiny, fault, "run", *tiny.options, *FEW, "--perturbation", "NEFTune", "--out", str(path))
        (machine,) = json.loads((path / "train" / "figures.json").read_text())["machines"]
        assert machine["device"].partition(" ")[0] == ("cpu" if fault is None else "simulated")
        words = ("--max_new_tokens", "8", "--temperature", "1", "--to", f"{name}.jsonl")
        run(tiny, fault, "generate", str(runs["cpu"]), *words)
    cpu, sim = runs["cpu"], runs["sim"]
    answers = [(tiny.model.parent / f"{name}.jsonl").read_text() for name in runs]
    assert answers[0] == answers[1]
    assert groups(cpu) == groups(sim)
    for ours, theirs in zip(metrics(sim), metrics(cpu), strict=True):
        assert ours["rows"] == theirs["rows"]
        for name in ("loss", "ntp", "mixup", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    found = weights(sim)
    for name, one in weights(cpu).items():  # AdamW takes the sign of what is nearly no gradient at a rate of 0.01
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-4)
