"""F10: a run is continued with another number of ranks, or with weights divided in another way."""

import json
from pathlib import Path

import pytest

from tests.faults.mines import KillAt
from tests.faults.runs import EVERY, digest, from_split, steps, words_of
from tests.forked import SIGKILLED, ended
from tests.tiny import Tiny, metrics

pytestmark = pytest.mark.slow

SAMPLES = '''
import json
from sftmix.components import Callback

class Samples(Callback):
    """Writes down the examples of each step, of all ranks."""
    gives = frozenset()
    def on_step_end(self, state):
        parts = state.read(lambda hidden, head, batch, plan: list(batch.ids))
        if state.stage == "train" and state.is_main:
            with open("samples.jsonl", "a") as file:
                file.write(json.dumps([state.step, sorted(sum(parts, []))]) + "\\n")
'''
EPOCHS, CUT = 12.5, 24
"""50 steps, of which so many are made before the change."""
ALONE: tuple[str, ...] = ()
DDP, FSDP = ("--training.parallel", "ddp"), ("--training.parallel", "fsdp")


def command(
    tiny: Tiny, place: Path, ranks: int, more: tuple[str, ...], fault: KillAt | None = None
) -> list[int | None]:
    (place / "sampling.py").write_text(SAMPLES)
    slow = ("--training.learning_rate", "0.001", "--callbacks+", "sampling.Samples")
    longer = ("--training.epochs", str(EPOCHS), "--reference.training.epochs", "3")
    it = ended(words_of(tiny, *slow, *longer, *more), cwd=place, faults=[fault, *[None] * (ranks - 1)])
    assert it.codes == [0] * ranks or fault, it.printed
    return it.codes


@pytest.fixture(scope="module")
def alone(plain, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("alone")
    command(plain, place, 1, ALONE)
    return place


def samples(place: Path) -> dict[int, list[str]]:
    return dict(json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines())


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, FSDP), (1, ALONE)), ((1, ALONE), (2, FSDP)), ((2, DDP), (2, FSDP)), ((2, FSDP), (2, DDP))],
    ids=["2 to 1", "1 to 2", "ddp to fsdp", "fsdp to ddp"],
)
def test_the_same_samples_and_losses(plain, alone, tmp_path, before, after):
    from_split(alone / "run", tmp_path)
    mine = KillAt(f"train/checkpoints/.tmp-step-{CUT + EVERY:08d}", 1)
    assert command(plain, tmp_path, *before, mine)[0] == SIGKILLED
    command(plain, tmp_path, *after)
    assert samples(tmp_path) == samples(alone)
    ours, theirs = metrics(tmp_path / "run"), metrics(alone / "run")
    assert len(ours) == len(theirs) == 50
    for name in ("rows", "examples_total"):
        assert [m[name] for m in ours] == [m[name] for m in theirs]
    off = [abs(one["loss"] - other["loss"]) for one, other in zip(ours, theirs, strict=True)]
    assert off[0] <= 1e-6
    assert off[CUT] <= 1e-6  # the first step after the resume
    assert max(off) <= 1e-4


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_ddp_and_fsdp_of_two_ranks_are_equal(plain, tmp_path, max_norm):
    for name, parallel in (("ddp", DDP), ("fsdp", FSDP)):
        (tmp_path / name).mkdir()
        command(plain, tmp_path / name, 2, (*parallel, "--training.max_grad_norm", str(max_norm)))
    ddp, fsdp = tmp_path / "ddp" / "run", tmp_path / "fsdp" / "run"
    assert len(steps(ddp)) == 50
    assert steps(ddp) == steps(fsdp)
    assert sum(float.fromhex(norm) > max_norm for _, _, norm in steps(ddp)) == 50
    assert digest(ddp) == digest(fsdp)
