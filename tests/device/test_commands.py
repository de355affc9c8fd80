"""Whole commands on a device that is not the CPU: the same numbers, and the same answers."""

import json

import pytest
import torch

from tests.device.sim import begin
from tests.forked import ended
from tests.tiny import groups, metrics, weights

# The CPU's layout of a micro-batch, so that sums are made in the same order.
FEW = ("--training.max_steps", "4", "--checkpoint.every", "2", "--training.length_groups", "1")


@pytest.mark.long
@pytest.mark.slow
def test_a_run_and_its_answers(plain, tmp_path):
    """Reference, scores, split, training with noise, checkpoints, export; then drawn answers of one exported model."""
    runs = {}
    for name, fault in (("cpu", None), ("sim", begin)):
        path = runs[name] = tmp_path / name
        words = ("run", *plain.options, *FEW, "--perturbation", "NEFTune", "--out", str(path))
        assert ended(words, cwd=tmp_path, faults=[fault]).code == 0
        (machine,) = json.loads((path / "train" / "figures.json").read_text())["machines"]
        assert machine["device"].partition(" ")[0] == ("cpu" if fault is None else "simulated")
        words = ("generate", str(runs["cpu"]), "--max_new_tokens", "8", "--temperature", "1", "--to", f"{name}.jsonl")
        assert ended(words, cwd=tmp_path, faults=[fault]).code == 0
    cpu, sim = runs["cpu"], runs["sim"]
    answers = [(tmp_path / f"{name}.jsonl").read_text() for name in runs]
    assert answers[0] == answers[1]
    assert groups(cpu) == groups(sim)
    for ours, theirs in zip(metrics(sim), metrics(cpu), strict=True):
        assert ours["rows"] == theirs["rows"]
        for name in ("loss", "ntp", "mixup", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    found = weights(sim)
    for name, one in weights(cpu).items():  # AdamW takes the sign of what is nearly no gradient at a rate of 0.01
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-4)
