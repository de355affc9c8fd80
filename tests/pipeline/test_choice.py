"""A selector that chooses by scores, and an order of epochs without pairs, in whole runs."""

from pathlib import Path

import pytest

from sftmix.tools.runs.rows import rows_of_run
from tests.tiny import SHORT, metrics, table

OWN = """
import numpy as np
from sftmix.components import Need, Order, RandomPairs, Selector, Splitter
from sftmix.types import Split


class Best(Selector):
    needs = frozenset({Need.CONFIDENCE})

    def select(self, scores, *, seed):
        return np.array(scores.ranked()[:16])


class Fails(Best):
    def select(self, scores, *, seed):
        raise ValueError("not these")


class ByStates(RandomPairs):
    needs = frozenset({Need.MEAN_STATES})


class OfStates(Splitter):
    needs = frozenset({Need.MEAN_STATES})

    def split(self, scores, *, seed):
        first = scores.states[:, 0]
        return Split(group=(first > np.median(first)).astype(np.int8), names=("low", "high"))


class Rising(Order):
    needs = frozenset({Need.CONFIDENCE})

    def rows(self, scores, *, epoch, seed):
        assert len(scores) in (16, 29)
        return np.array(scores.ranked()[::-1])
"""
CHOICE = ("--selector", "own_choice.Best")
STATES = ("--pairing", "own_choice.ByStates")
ORDER = ("--objective", "NTP", "--order", "own_choice.Rising")
WHOLE = ("--training.epochs", "1", "--training.warmup_ratio", "0", "--checkpoint.every", "0")


@pytest.fixture
def own(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_choice.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def ranked(run: Path) -> list[str]:
    """The ids of a run, most confident first."""
    scores = table(run / "confidence" / "confidence.parquet")
    return [name for _, name in sorted(zip(scores["confidence"], scores["id"], strict=True), reverse=True)]


def test_the_target_is_trained_on_what_was_chosen_of_all_scored_rows(own, tiny, made, sftmix):
    words = [*tiny.options, *WHOLE, *CHOICE, "--with_baseline", "--reference.training.max_steps", "2"]
    run = made("run", *words)
    best = ranked(run)[:16]
    assert len(ranked(run)) == 29
    assert sorted(table(run / "choice" / "selected.parquet")["id"]) == sorted(best)
    groups = dict(zip(*(table(run / "split" / "split.parquet")[name] for name in ("id", "group")), strict=True))
    assert {name for name, group in groups.items() if group != "unpaired"} == set(best)
    assert [groups[name] for name in best] == ["confident"] * 8 + ["unconfident"] * 8
    data = rows_of_run(run)[1].data.train
    expected = sum(int(data[row].target[1:].sum()) for row in range(len(data)) if data.ids[row] in best)
    for stage in ("train", "baseline"):
        lines = metrics(run, stage)
        assert (len(lines), sum(line["ntp_tokens"] for line in lines)) == (2, expected)
    before = (run / "train" / "metrics.jsonl").read_bytes()
    made("run", *words)  # read back
    assert (run / "train" / "metrics.jsonl").read_bytes() == before
    done = sftmix("verify", str(run), "--trust")
    assert done.code == 0, done.out + done.err


def test_an_epoch_without_pairs_goes_through_the_rows_in_their_order(own, tiny, made, sftmix):
    for more, first in (([], 29), (CHOICE, 16)):
        run = made(
            "run", *tiny.options, *WHOLE, *ORDER, *more, "--reference.training.max_steps", "2", out=f"run{first}"
        )
        rows, data = ranked(run)[:first][::-1], rows_of_run(run)[1].data.train
        tokens = {data.ids[row]: int(data[row].target[1:].sum()) for row in range(len(data))}
        expected = [sum(tokens[name] for name in rows[start : start + 8]) for start in range(0, first, 8)]
        assert [line["ntp_tokens"] for line in metrics(run)] == expected
        assert not (run / "split").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--order", "own_choice.Rising"], "order Rising and pairing RandomPairs exclude each other"),
        ([*ORDER, "--reference", "Online"], "order Rising needs the confidence of each example"),
        ([*CHOICE, "--reference", "Online"], "selector Best needs the confidence of each example"),
        ([*STATES, "--reference.checkpoints", "online"], "ByStates needs the mean state of each response"),
        ([*STATES, "--splitter", "RandomSplit"], "ByStates needs the mean state of each response"),
        ([*CHOICE, "--confidence", "IFD"], "confidence IFD needs the NLL of each response without its instruction"),
    ],
)
def test_what_no_reference_could_give_is_refused(own, tiny, refused, words, said):
    assert said in refused("run", *tiny.bare, *SHORT, *words)


def test_a_choice_that_failed_does_not_stand_for_another_selector(own, tiny, made, refused):
    """Its directory is there, and the rows of the run were not selected."""
    words = ["run", *tiny.options, *SHORT, "--reference.training.max_steps", "2"]
    with pytest.raises(ValueError, match="not these"):
        made(*words, "--selector", "own_choice.Fails")
    said = refused(*words, "--selector", "Longest", "--selector.k", "8")
    assert "reference: was made with other inputs: the training rows are others" in said


def test_a_splitter_by_states_alone_gets_a_reference(own, tiny, made, refused):
    run = made("run", *tiny.options, *SHORT, "--splitter", "own_choice.OfStates")
    groups = table(run / "split" / "split.parquet")["group"]
    assert (sum(group == "low" for group in groups), sum(group == "high" for group in groups)) == (15, 14)
    said = refused("run", *tiny.bare, *SHORT, "--splitter", "own_choice.OfStates", "--reference", "Online", out="b")
    assert "splitter OfStates needs the mean state of each response, which reference Online" in said
