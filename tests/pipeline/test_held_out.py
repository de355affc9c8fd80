"""The held-out NLL by label or by the names of data.eval."""

import numpy as np
import pytest

from sftmix.common.files import read_json
from sftmix.pipeline.rows import MOST_GROUPS, held_out_groups
from sftmix.training.scoring import held_out_metrics, nll_by
from sftmix.types import RowScores


class Held:
    """What the grouping reads of held-out rows."""

    def __init__(self, labels=None, sources=(), packed=False):
        self.labels, self.sources, self.packed = labels, list(sources), packed


@pytest.mark.parametrize(
    ("names", "sources", "groups"),
    [
        (["a.json", "b.json"], ["a.json:1", "b.json:1[17]", "a.json:2"], ["a.json", "b.json", "a.json"]),
        (["x/a.json", "./texts/"], ["texts/one.txt", "x/a.json:1"], ["./texts/", "x/a.json"]),
        (["u/set", "u/settled"], ["u/settled[3]", "u/set[0]"], ["u/settled", "u/set"]),
    ],
)
def test_rows_of_several_files_go_by_their_names(names, sources, groups):
    assert held_out_groups(Held(sources=sources), names) == groups


def test_labels_come_first_and_one_group_is_none():
    sources = ["a:1", "b:1"]
    assert held_out_groups(Held(labels=["good", None], sources=sources), ["a", "b"]) == ["good", "None"]
    many = Held(labels=[str(k) for k in range(MOST_GROUPS + 1)])
    alike, packed = Held(labels=["good", "good"], sources=sources), Held(sources=sources, packed=True)
    for rows, names in ((None, ["a", "b"]), (Held(sources=["a:1"]), ["a"]), (many, []), (alike, ["a", "b"])):
        assert held_out_groups(rows, names) is None
    assert held_out_groups(packed, ["a", "b"]) is None


def test_the_nll_of_a_group_is_that_of_its_tokens():
    nll, tokens = np.array([3.0, 5.0, 7.0, 0.0]), np.array([2, 4, 6, 0])
    scores = RowScores(nll, tokens, np.zeros(4, dtype=np.int64))
    assert nll_by(scores, ["b", "a", "b", "empty"]) == {"a": 5 / 4, "b": 10 / 8}
    assert held_out_metrics(scores)["eval_nll"] == 15 / 12


def test_labelled_rows_that_were_held_out_go_by_their_labels(tiny, rows, made):
    words = [word for word in tiny.options if word not in ("--data.eval", str(tiny.eval))]
    words += ["--data.eval_fraction", "0.4", "--data.label_field", "kind", "--objective", "NTP"]
    run = made("run", *words, "--training.max_steps", "1")
    by = read_json(run / "summary.json")["eval_nll_by"]
    assert len(by) > 1
    assert by.keys() <= {row["kind"] for row in rows}
