"""What a stage has written before it is done is believed only as the checkpoint has its hash; else it is made again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sftmix.batches.order import Slot
from sftmix.components import Callback
from sftmix.disk.appended import append_batch, read_batches
from sftmix.options import CheckpointOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import full_weights
from sftmix.training.dynamics import ScoreAtCheckpoints
from sftmix.training.loop import train
from sftmix.words.errors import CheckpointError, Stopped
from tests.fast import some_fast
from tests.faults.runs import one_bit
from tests.toy import Interrupt, metrics_of, toy_model, toy_stage
from tests.trained import DATA, assert_exact


def made(directory: Path, *more: Callback) -> tuple[dict[str, torch.Tensor], np.ndarray, list[dict]]:
    """Six steps, scored after 2, 4 and 6: weights, NLL of each row at each of these, and what the log says of steps."""
    scoring = ScoreAtCheckpoints(ids=DATA.ids, steps=[2, 4, 6], directory=directory / "scores", world=World())
    stage = toy_stage(
        directory,
        [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 3,
        data=DATA,
        model=toy_model(dtype=torch.float32),
        options={"learning_rate": 0.01},
        checkpoint=CheckpointOptions(every=2, keep=9),
        callbacks=[*more, scoring],
    )
    done = full_weights(train(stage, World()).module)
    told = [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in metrics_of(directory)]
    return done, scoring.dynamics().nll_sum, told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("whole"))


def exchange(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def shift_the_ids(file: Path) -> None:
    """The file says so in its own way: Parquet, whole, of the same examples."""
    table = pq.read_table(file)
    ids = table["id"].to_pylist()
    pq.write_table(table.set_column(0, "id", [[*ids[1:], ids[0]]]), file)


def another_loss(log: Path, step: int) -> None:
    lines = log.read_text().splitlines()
    lines[step - 1] = json.dumps(json.loads(lines[step - 1]) | {"loss": 0.5})
    log.write_text("".join(f"{line}\n" for line in lines))


def score(step: int) -> str:
    return f"scores/step-{step:08d}.parquet"


DAMAGES: dict[str, tuple[Callable[[Path], object], int | None]] = {
    "none": (lambda place: None, 5),
    "one bit of the last scores": (lambda place: one_bit(place / score(4)), 2),
    "empty": (lambda place: (place / score(4)).write_bytes(b""), 2),
    "half": (lambda place: (place / score(4)).write_bytes((place / score(4)).read_bytes()[:900]), 2),
    "gone": (lambda place: (place / score(4)).unlink(), 2),
    "ids": (lambda place: shift_the_ids(place / score(4)), 2),
    "one bit of the first scores": (lambda place: one_bit(place / score(2)), None),
    "exchanged": (lambda place: exchange(place / score(2), place / score(4)), None),
    "scores of later steps": (lambda place: shutil.copy(place / score(2), place / score(6)), 5),
    "a line after the second checkpoint": (lambda place: another_loss(place / "metrics.jsonl", 5), 4),
    "a line of the first steps": (lambda place: another_loss(place / "metrics.jsonl", 1), None),
    "no log": (lambda place: (place / "metrics.jsonl").write_bytes(b""), None),
    "a log without sense": (lambda place: (place / "metrics.jsonl").write_bytes(b"{\n{\n"), None),
}
"""What is done to a stage that a signal stopped after step 5, and the step it goes on from; None: it asks for help."""


@pytest.mark.filterwarnings("ignore:skipping checkpoint")
@pytest.mark.parametrize("name", some_fast(DAMAGES, every=3))
def test_what_was_damaged_after_a_stop_is_made_again(tmp_path, whole, capsys, name):
    damage, expected = DAMAGES[name]
    with pytest.raises(Stopped):
        made(tmp_path, Interrupt(step=5))
    damage(tmp_path)
    if expected is None:  # every checkpoint has a hash of it; what the message says helps
        with pytest.raises(CheckpointError, match="move them away to start again"):
            made(tmp_path)
        (tmp_path / "checkpoints").rename(tmp_path / "away")
    weights, nll, told = made(tmp_path)
    assert (f"resuming after step {expected} of 6" in capsys.readouterr().out) is (expected is not None)
    assert_exact(weights, whole[0])
    np.testing.assert_array_equal(nll, whole[1])
    assert told == whole[2]


def test_lines_of_batches_that_were_damaged_are_left_out(tmp_path):
    file, other = tmp_path / "scores-1.jsonl", tmp_path / "scores-2.jsonl"
    for number in range(4):
        append_batch(file, [{"id": number, "nll": number / 3}])
        append_batch(other, [{"id": number, "nll": 7.0}])
    assert read_batches(file) == [{"id": number, "nll": number / 3} for number in range(4)]
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.3333333333333333", b"0.3333333333333331")
    lines[2] = other.read_bytes().splitlines(keepends=True)[2]
    file.write_bytes(b"".join([*lines, b'[{"id": 9}]\n', lines[0][:-9]]))  # as before there were hashes; torn
    with pytest.warns(UserWarning, match=r"3 lines of .*scores-1\.jsonl are not as they were written, and are made"):
        assert [record["id"] for record in read_batches(file)] == [0, 3]
    append_batch(file, [{"id": 1, "nll": 0.0}])
    with pytest.warns(UserWarning, match="3 lines"):
        assert [record["id"] for record in read_batches(file)] == [0, 3, 1]
