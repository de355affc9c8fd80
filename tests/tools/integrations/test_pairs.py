"""A file that gives the training rows no pair is refused where training begins; evaluation needs none."""

import numpy as np
import pytest

from sftmix.disk.tables import write_dynamics, write_split
from sftmix.tools.integrations import groups_of
from sftmix.types import Split, TrainingDynamics
from tests.forked import on_ranks
from tests.tiny import Tiny
from tests.tools.integrations.test_trainers import Mixed, rows_of, trainer_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


def dynamics(path, ids, nll):
    counted, right = np.full(len(ids), 8), np.full((len(ids), 1), -1)
    write_dynamics(path, TrainingDynamics(ids, np.array([1]), np.asarray(nll, float)[:, None], counted, right))
    return path


@pytest.mark.parametrize(
    ("nll", "expected"),
    [
        (range(29), [0] * 6 + [-1] + [1] * 6),
        ([8.0] * 29, None),  # equal scores are ordered by id
        ([1.0] * 3 + [2.0] * 7 + [3.0] * 19, None),  # as are those at the median
    ],
)
def test_the_median_is_that_of_the_training_rows(small, tmp_path, sftmix, nll, expected):
    """As `sftmix split` has it for these rows, with the same file of more rows."""
    ids = rows_of(small).ids
    path = dynamics(tmp_path / "dynamics.parquet", ids, nll)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(small.train.read_text(encoding="utf-8").splitlines(True)[:13]), encoding="utf-8")
    few = Tiny(small.model, train, small.eval)
    words = ("--reference", "FromFile", "--reference.path", str(path))
    done = sftmix("split", *few.bare, *words, "--out", str(tmp_path / "run"))
    assert done.code == 0, done.err
    found = groups_of(path, ids[:13]).tolist()
    assert found == groups_of(tmp_path / "run" / "split" / "split.parquet", ids[:13]).tolist()
    assert sorted(found) == [-1] + [0] * 6 + [1] * 6
    assert found == (expected or found)


def split(path, ids, group, *names):
    write_split(path, ids, Split(np.full(len(ids), group, np.int8), names))


FILES = {
    "unpaired": (0, 0, lambda path, ids: split(path, ids, -1, "one", "other")),
    "confident": (29, 0, lambda path, ids: split(path, ids, 0, "one", "other")),
    "unconfident": (0, 29, lambda path, ids: split(path, ids, 1, "one", "other")),
    "one name": (29, 0, lambda path, ids: split(path, ids, 0, "all")),
}
"""How many rows are confident and unconfident with it."""


def refused(tiny, directory, kind):
    directory.mkdir()
    one, other, write = FILES[kind]
    write(path := directory / "file.parquet", rows_of(tiny).ids)
    trainer = trainer_of(Mixed, tiny, directory, sftmix_split=str(path))
    held_out = trainer.train_dataset.remove_columns("sftmix_row")
    assert trainer.evaluate(held_out)["eval_loss"] > 1
    message = rf"sftmix_split: .*file\.parquet makes {one} training rows confident and {other} unconfident, .* name a"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", FILES)
def test_a_file_without_a_pair_is_no_plain_training(small, tmp_path, kind):
    refused(small, tmp_path / "one", kind)


def one_rank(world, model, rows, directory):
    refused(Tiny(model, rows, rows), directory / str(world.rank), "unpaired")


def test_no_rank_waits_for_another(small, tmp_path):
    on_ranks(one_rank, small.model, small.train, tmp_path)


def test_one_pair_is_enough(small, tmp_path):
    path, group = tmp_path / "file.parquet", [0, 1] + 27 * [-1]
    split(path, rows_of(small).ids, group, "one", "other")
    trainer = trainer_of(Mixed, small, tmp_path, sftmix_split=str(path))
    trainer.train()
    assert trainer.state.global_step == 3
