"""F8: numbers that are not finite, in one process and on one rank of two; nothing of them reaches a checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.runs import checkpoints, from_split, long, words_of
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


def broken_run(small: Tiny, whole: Path, place: Path, *more: str, ranks: int = 1):
    (place / "breaking.py").write_text(BROKEN)
    from_split(whole, place)
    return ended(words_of(small, *more), cwd=place, faults=[None] * ranks)


def broken(steps: str, value: str = "nan", rank: int = 0) -> list[str]:
    given = ("--perturbation.steps", steps, "--perturbation.value", value, "--perturbation.rank", str(rank))
    return ["--perturbation", "breaking.Broken", *given]


def assert_all_finite(run: Path) -> None:
    """Look at every tensor of every checkpoint."""
    for file in (run / "train").rglob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values())


def loss_at_the_end(run: Path) -> float:
    """The mean loss of the last epoch, four steps."""
    return sum(m["loss"] for m in metrics(run)[-4:]) / 4


@pytest.fixture(scope="module")
def longer(small, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("longer")
    assert ended(words_of(small, *LONGER), cwd=place).code == 0
    return place / "run"


@pytest.mark.parametrize(
    "value",
    ["nan", *(pytest.param(value, marks=(pytest.mark.slow, pytest.mark.long)) for value in ("inf", "gradient"))],
)
def test_one_bad_step_is_skipped(small, longer, tmp_path, value):
    it = broken_run(small, longer, tmp_path, *broken("[4]", value), *LONGER)
    assert it.code == 0, it.printed
    assert [m["step"] for m in metrics(tmp_path / "run") if m["grad_norm"] is None] == [5]
    assert (metrics(tmp_path / "run")[4]["loss"] is None) == (value != "gradient")
    off = loss_at_the_end(tmp_path / "run") / loss_at_the_end(longer) - 1
    assert abs(off) < 0.01
    assert_all_finite(tmp_path / "run")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(small, whole, tmp_path):
    (tmp_path / "spoiling.py").write_text(SPOILED)
    it = broken_run(small, whole, tmp_path, "--callbacks+", "spoiling.Spoiled")
    assert it.code == 6, it.printed
    assert [name[-1] for name in checkpoints(tmp_path / "run")] == ["3"]
    assert_all_finite(tmp_path / "run")


@long
@pytest.mark.parametrize(("parallel", "value"), [("ddp", "nan"), ("fsdp", "nan"), ("fsdp", "gradient")])
def test_one_rank_of_two_has_a_bad_step(small, whole_of_two, tmp_path, parallel, value):
    more = [*broken("[4]", value, rank=1), "--training.parallel", parallel]
    it = broken_run(small, whole_of_two, tmp_path, *more, ranks=2)
    assert it.codes == [0, 0], it.printed
    assert [m["step"] for m in metrics(tmp_path / "run") if m["grad_norm"] is None] == [5]
    assert_all_finite(tmp_path / "run")


@long
def test_too_many_bad_steps_of_one_rank_end_both_with_6(small, tmp_path):
    """The fourth in a row; the tenth in all: tests/training/test_stage.py."""
    (tmp_path / "breaking.py").write_text(BROKEN)
    words = words_of(small, *broken("[4,5,6,7,8,9,10,11]", rank=1), "--training.parallel", "ddp")
    it = ended(words, cwd=tmp_path, faults=[None, None])
    assert it.codes == [6, 6], it.printed
    assert metrics(tmp_path / "run")[-1]["step"] == 7
    assert_all_finite(tmp_path / "run")


def test_a_learning_rate_beyond_float32_is_refused(small, tmp_path):
    it = ended(words_of(small, "--training.learning_rate", "1e38"), cwd=tmp_path)
    assert it.code == 2
    assert "training.learning_rate is 1e+38; allowed: above 0, at most 1e+30" in it.printed


@long
@pytest.mark.parametrize("rate", ["1e6", "1e30"])
def test_a_learning_rate_that_blows_up_saves_nothing_bad(small, tmp_path, rate):
    reference = ("--reference.training.learning_rate", "0.01")
    it = ended(words_of(small, "--training.learning_rate", rate, *reference), cwd=tmp_path)
    assert it.code == 6, it.printed
    assert_all_finite(tmp_path / "run")
