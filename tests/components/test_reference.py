"""References: what is asked of the loop, and dynamics joined by id from a file."""

import numpy as np
import pytest

from sftmix.components import TrainedReference
from sftmix.components.reference import FromCheckpoints, FromFile
from sftmix.disk.places import Origin, started
from sftmix.disk.tables import write_dynamics, write_table
from sftmix.types import TrainingDynamics
from sftmix.words.errors import DataError

STORED = TrainingDynamics(
    ids=["a", "b", "c"],
    steps=np.asarray([5, 10]),
    nll_sum=np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    n_tokens=np.asarray([1, 2, 3]),
    n_correct=np.asarray([[0, 1], [1, 2], [2, 3]]),
    token_nll=[np.full((2, n), n, dtype=np.float32) for n in (1, 2, 3)],
)


class Context:
    """Stands for the pipeline: records what was asked."""

    def __init__(self, ids, hashes=()):
        self.ids, self.hashes = ids, hashes
        self.asked = None

    def content_hashes(self):
        return self.hashes

    def train_and_score(self, checkpoints):
        self.asked = checkpoints
        return STORED


def test_trained_reference_asks_for_its_checkpoints():
    context = Context(["a", "b", "c"])
    assert TrainedReference(checkpoints=[0, 0.5, 1]).collect(context) is STORED
    assert context.asked == [0, 0.5, 1]
    TrainedReference().collect(context)
    assert context.asked == 5


def test_a_pattern_of_checkpoints_is_looked_for_where_the_run_was_started(tmp_path):
    for number in (9, 10):
        (tmp_path / "output" / f"checkpoint-{number}").mkdir(parents=True)
    here = started.set(Origin([tmp_path / "elsewhere", tmp_path]))
    paths = FromCheckpoints(paths=["output/checkpoint-*", "other"]).paths
    started.reset(here)
    assert paths == [str(tmp_path / "output" / "checkpoint-9"), str(tmp_path / "output" / "checkpoint-10"), "other"]


def test_brackets_in_names_that_are_there_match_nothing_else(tmp_path):
    """A directory that is there is itself, and so is the one in which a relative pattern is looked for."""
    for place in ("ck[1]/m", "ck1/m", "sweep[2]/m-1", "sweep2/m-1"):
        (tmp_path / place).mkdir(parents=True)
    here = started.set(Origin([tmp_path / "sweep[2]", tmp_path]))
    paths = FromCheckpoints(paths=["ck[1]/m", str(tmp_path / "ck[1]/m"), "m-*"]).paths
    started.reset(here)
    assert paths == [*[str(tmp_path / "ck[1]/m")] * 2, str(tmp_path / "sweep[2]/m-1")]


def test_places_of_checkpoints():
    for checkpoints in (1, [0], [0.0, 1.0], [0, 40, 100.0]):
        assert TrainedReference(checkpoints=checkpoints).checkpoints == checkpoints


def test_a_file_is_joined_by_id(tmp_path):
    write_dynamics(tmp_path / "d.parquet", STORED)
    joined = FromFile(path=str(tmp_path / "d.parquet")).collect(Context(["c", "new", "a"]))
    assert list(joined.ids) == ["c", "new", "a"]
    np.testing.assert_array_equal(joined.steps, STORED.steps)
    np.testing.assert_array_equal(joined.n_tokens, [3, 0, 1])
    np.testing.assert_array_equal(joined.nll_sum, [[5, 6], [0, 0], [1, 2]])
    np.testing.assert_array_equal(joined.n_correct, [[2, 3], [0, 0], [0, 1]])
    assert [nll.shape for nll in joined.token_nll] == [(2, 3), (2, 0), (2, 1)]
    assert joined.token_nll[0][0, 0] == 3
    assert joined.scored.tolist() == [True, False, True]


def test_a_file_of_other_data_is_an_error(tmp_path):
    write_dynamics(tmp_path / "d.parquet", STORED)
    with pytest.raises(DataError, match="none of the 2 examples"):
        FromFile(path=tmp_path / "d.parquet").collect(Context(["x", "y"]))
    with pytest.raises(DataError, match=r"missing\.parquet"):
        FromFile(path=tmp_path / "missing.parquet").collect(Context(["a"]))


def test_shared_scores_are_joined_by_the_hash_of_texts_and_equal_texts_by_their_number(tmp_path, monkeypatch):
    """Downloaded before, as the hub's cache has them; the rows have other ids, another order, and are fewer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--me--joined" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--me--joined" / "refs" / "main").write_text("c0ffee")
    files = tmp_path / "datasets--me--joined" / "snapshots" / "c0ffee"
    write_dynamics(files / "dynamics.parquet", STORED.of(["b", "a", "c"]))
    write_table(files / "rows.parquet", ["a", "b", "c"], hash=["one", "two", "one"])
    reference = FromFile(path="hub:me/joined")
    joined = reference.collect(Context(["x", "y", "z"], ["two", "one", "one"]))
    assert list(joined.ids) == ["x", "y", "z"]
    np.testing.assert_array_equal(joined.nll_sum, [[3, 4], [1, 2], [5, 6]])
    np.testing.assert_array_equal(reference.collect(Context(["y"], ["one"])).nll_sum, [[1, 2]])
    with pytest.raises(DataError, match=r"scores of 3 rows, and 2 of the 4 rows .* \(first: v, w\)"):
        reference.collect(Context(["u", "x", "v", "w"], ["one", "two", "three", "two"]))
