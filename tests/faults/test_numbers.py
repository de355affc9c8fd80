"""F8: numbers that are not finite, in one process and on one rank of two; nothing of them reaches a checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.runs import checkpoints, from_split, words_of
from tests.forked import ended
from tests.tiny import Tiny, metrics

BROKEN = '''
import os
from sftmix.components import Perturbation

class Broken(Perturbation):
    """Makes the input embeddings of one rank infinite, or no number, in some steps (from 0)."""
    def __init__(self, *, steps: list[int], value: str = "nan", rank: str = "0"):
        self.steps, self.value, self.rank = steps, value, rank
    def embeddings(self, e, mask, *, ids, step, seed):
        wrong = step in self.steps and os.environ.get("RANK", "0") == self.rank
        if wrong and self.value == "gradient":  # of this rank alone, and its loss is a number
            e.register_hook(lambda gradient: gradient * float("nan"))
            return e
        return e * float(self.value) if wrong else e
'''
SPOILED = '''
from sftmix.components import Callback

class Spoiled(Callback):
    """Sets one weight of the LM head to NaN after step 5, as a fault of memory may."""
    gives = frozenset()
    def on_step_end(self, state):
        if (state.stage, state.step) == ("train", 5):
            state.read(lambda hidden, head, batch, plan: head.weight.data.view(-1)[:1].fill_(float("nan")).sum().item())
'''


LONGER = ("--training.epochs", "12", "--training.learning_rate", "0.001")


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


def loss_at_the_end(run: Path) -> float:
    """The mean loss of the last epoch, four steps."""
    return sum(m["loss"] for m in metrics(run)[-4:]) / 4


@pytest.fixture(scope="module")
def longer(small, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("longer")
    assert ended(words_of(small, *LONGER), cwd=place).code == 0
    return place / "run"


RARE = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=RARE), pytest.param("gradient", marks=RARE)])
def test_one_bad_step_is_skipped(small, longer, tmp_path, value, record_property):
    it = trained(small, longer, tmp_path, *broken("[4]", value), *LONGER)
    assert it.code == 0, it.printed
    assert [m["step"] for m in metrics(tmp_path / "run") if m["grad_norm"] is None] == [5]
    assert (metrics(tmp_path / "run")[4]["loss"] is None) == (value != "gradient")
    off = loss_at_the_end(tmp_path / "run") / loss_at_the_end(longer) - 1
    assert abs(off) < 0.01
    found = assert_all_finite(tmp_path / "run")
    record_property("F8", f"one step of 48, {value}: skipped, {found} tensors finite, loss at the end off by {off:.2%}")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(small, whole, tmp_path, record_property):
    (tmp_path / "spoiling.py").write_text(SPOILED)
    it = trained(small, whole, tmp_path, "--callbacks+", "spoiling.Spoiled")
    assert it.code == 6, it.printed
    assert [name[-1] for name in checkpoints(tmp_path / "run")] == ["3"]
    assert_all_finite(tmp_path / "run")
    record_property("F8", "a weight set to NaN after step 5: exit 6, the checkpoint of step 3 stands alone")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("parallel", "value"), [("ddp", "nan"), ("fsdp", "nan"), ("fsdp", "gradient")])
def test_one_rank_of_two_has_a_bad_step(small, whole_of_two, tmp_path, parallel, value, record_property):
    more = [*broken("[4]", value, rank=1), "--training.parallel", parallel]
    it = trained(small, whole_of_two, tmp_path, *more, ranks=2)
    assert it.codes == [0, 0], it.printed
    assert [m["step"] for m in metrics(tmp_path / "run") if m["grad_norm"] is None] == [5]
    assert_all_finite(tmp_path / "run")
    record_property("F8", f"one rank of two ({parallel}), one step {value}: both skip the same step")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_bad_steps_that_go_on_end_with_6(small, whole, request, tmp_path, ranks, record_property):
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
def test_too_many_bad_steps_in_all_end_with_6(small, tmp_path, ranks, record_property):
    """Never four in a row, and on the last rank alone: the tenth, in step 13, is the last."""
    (tmp_path / "breaking.py").write_text(BROKEN)
    bad = broken("[0,1,2,4,5,6,8,9,10,12]", rank=ranks - 1)
    longer = ("--training.epochs", "6", *(("--training.parallel", "ddp") if ranks > 1 else ()))
    it = ended(words_of(small, *bad, *longer), cwd=tmp_path, faults=[None] * ranks)
    assert it.codes == [6] * ranks, it.printed
    assert it.printed.count("train: 10 of the first 13 steps, 1 in a row, have a non-finite gradient") == 1
    assert metrics(tmp_path / "run")[-1]["step"] == 12
    assert_all_finite(tmp_path / "run")
    record_property("F8", f"10 bad steps of 13, none four in a row, {ranks} rank(s): exit 6 at step 13 on all")


def test_a_learning_rate_beyond_float32_is_refused(small, tmp_path, record_property):
    it = ended(words_of(small, "--training.learning_rate", "1e38"), cwd=tmp_path)
    assert it.code == 2
    assert "training.learning_rate is 1e+38; allowed: above 0, at most 1e+30" in it.printed
    record_property("F8", "learning rate 1e38: refused with 2")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("rate", ["1e6", "1e30"])
def test_a_learning_rate_that_blows_up_saves_nothing_bad(small, tmp_path, rate, record_property):
    reference = ("--reference.training.learning_rate", "0.01")
    it = ended(words_of(small, "--training.learning_rate", rate, *reference), cwd=tmp_path)
    assert it.code == 6, it.printed
    assert_all_finite(tmp_path / "run")
    record_property("F8", f"learning rate {rate}: exit {it.code}, every tensor on disk finite")
