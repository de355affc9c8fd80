"""F8: numbers that are not finite, in one process and on one rank of two; nothing of them reaches a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.processes import ended, from_split, words_of
from tests.tiny import Tiny, metrics, weights

BROKEN = '''
import os
from sftmix.components import Perturbation

class Broken(Perturbation):
    """Makes the input embeddings of one rank infinite, or no number, in some steps (from 0)."""
    def __init__(self, *, steps: list[int], value: str = "nan", rank: str = "0"):
        self.steps, self.value, self.rank = steps, value, rank
    def embeddings(self, e, mask, *, ids, step, seed):
        wrong = step in self.steps and os.environ.get("RANK", "0") == self.rank
        return e * float(self.value) if wrong else e
'''


def trained(small: Tiny, whole: Path, place: Path, *more: str, ranks: int = 1):
    (place / "breaking.py").write_text(BROKEN)
    from_split(whole, place)
    return ended(words_of(small, *more), cwd=place, faults=[None] * ranks)


def broken(steps: str, value: str = "nan", rank: int = 0) -> list[str]:
    given = ("--perturbation.steps", steps, "--perturbation.value", value, "--perturbation.rank", str(rank))
    return ["--perturbation", "breaking.Broken", *given]


def assert_all_finite(run: Path) -> int:
    """Look at every tensor of every checkpoint; return how many there are."""
    tensors = [t for f in (run / "train").rglob("*.safetensors") for t in load_file(f).values()]
    assert all(bool(torch.isfinite(t).all()) for t in tensors)
    return len(tensors)


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=[pytest.mark.slow, pytest.mark.long])])
def test_one_bad_step_is_skipped(small, whole, tmp_path, value, record_property) -> None:
    it = trained(small, whole, tmp_path, *broken("[4]", value))
    assert it.code == 0, it.printed
    assert [m["step"] for m in metrics(tmp_path / "run") if m["grad_norm"] is None] == [5]
    last, theirs = metrics(tmp_path / "run")[-1]["loss"], metrics(whole)[-1]["loss"]
    found = assert_all_finite(tmp_path / "run")
    record_property(
        "F8", f"one step {value}: skipped, {found} tensors finite, last loss off by {last / theirs - 1:.2%}"
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_of_two_has_a_bad_step(small, whole_of_two, tmp_path, parallel, record_property) -> None:
    more = [*broken("[4]", rank=1), "--training.parallel", parallel]
    it = trained(small, whole_of_two, tmp_path, *more, ranks=2)
    assert it.codes == [0, 0], it.printed
    assert [m["step"] for m in metrics(tmp_path / "run") if m["grad_norm"] is None] == [5]
    assert_all_finite(tmp_path / "run")
    record_property("F8", f"one rank of two ({parallel}), one step: both skip the same step")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_bad_steps_that_go_on_end_with_6(small, whole, request, tmp_path, ranks, record_property) -> None:
    whole = request.getfixturevalue("whole_of_two") if ranks > 1 else whole
    more = ["--training.parallel", "ddp"] if ranks > 1 else []
    it = trained(small, whole, tmp_path, *broken("[4,5,6,7,8,9,10,11]", rank=ranks - 1), *more, ranks=ranks)
    assert it.codes == [6] * ranks, it.printed
    assert metrics(tmp_path / "run")[-1]["step"] <= 8  # the fourth bad step in a row is the last
    assert_all_finite(tmp_path / "run")
    record_property(
        "F8", f"bad from step 5 on, {ranks} rank(s): exit 6 at step {metrics(tmp_path / 'run')[-1]['step'] + 1}"
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_too_many_bad_steps_in_all_end_with_6(small, tmp_path, ranks, record_property) -> None:
    """Never four in a row, and on the last rank alone: the tenth, in step 13, is the last."""
    (tmp_path / "breaking.py").write_text(BROKEN)
    bad = broken("[0,1,2,4,5,6,8,9,10,12]", rank=ranks - 1)
    longer = ("--training.epochs", "6", *(("--training.parallel", "ddp") if ranks > 1 else ()))
    it = ended(words_of(small, *bad, *longer), cwd=tmp_path, faults=[None] * ranks)
    assert it.codes == [6] * ranks, it.printed
    assert it.printed.count("train: 10 of the first 13 steps, more than 1%, have a non-finite gradient") == ranks
    assert metrics(tmp_path / "run")[-1]["step"] == 12
    assert_all_finite(tmp_path / "run")
    record_property("F8", f"10 bad steps of 13, none four in a row, {ranks} rank(s): exit 6 at step 13 on all")


def test_a_learning_rate_beyond_float32_is_refused(small, tmp_path, record_property) -> None:
    it = ended(words_of(small, "--training.learning_rate", "1e38"), cwd=tmp_path)
    assert it.code == 2
    assert "training.learning_rate is 1e+38; allowed: above 0, at most 1e+30" in it.printed
    record_property("F8", "learning rate 1e38: refused with 2")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("rate", ["1e6", "1e30"])
def test_a_learning_rate_that_blows_up_saves_nothing_bad(small, tmp_path, rate, record_property) -> None:
    reference = ("--reference.training.learning_rate", "0.01")
    it = ended(words_of(small, "--training.learning_rate", rate, *reference), cwd=tmp_path)
    assert it.code in (2, 6, 0), it.printed
    if it.code == 2:  # the reference was trained with another rate
        pytest.fail(it.printed)
    assert_all_finite(tmp_path / "run")
    if it.code == 0:
        assert all(math.isfinite(float(w.abs().max())) for w in weights(tmp_path / "run").values())
    record_property("F8", f"learning rate {rate}: exit {it.code}, every tensor on disk finite")
