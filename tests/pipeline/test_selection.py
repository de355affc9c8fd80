"""Which examples are trained on: chosen before anything else, by components of a user's own, through the pipeline."""

from dataclasses import replace

import numpy as np
import pytest

from sftmix.common.errors import ConfigError
from sftmix.components import Perturbation, Selector
from sftmix.pipeline.recipe import run
from sftmix.tools.quickstart import write_rows
from tests.pipeline.test_identity import config
from tests.tiny import metrics, table


class LongResponses(Selector):
    """The k longest responses, in an order that is not the file's; remembers what it saw."""

    def __init__(self, *, k: int = 12):
        self.k = k

    def select(self, scores, *, seed):
        assert np.isnan(scores.confidence).all()
        assert set(scores.columns) >= {"kind"}
        return np.argsort(-scores.n_tokens, kind="stable")[: self.k].astype(np.int64)


def test_only_the_selected_are_scored_split_and_trained_on(finished, tiny, tmp_path, capsys):
    run(config(tiny, tmp_path / "run", selector=LongResponses()))
    everything = table(finished.path / "confidence" / "dynamics.parquet")
    lengths = dict(zip(everything["id"], everything["n_tokens"], strict=True))
    chosen = table(tmp_path / "run" / "selection" / "selected.parquet")["id"]
    assert sorted(lengths[i] for i in chosen) == sorted(lengths.values())[-12:]
    assert chosen == [i for i in lengths if i in set(chosen)]
    for name in ("confidence/dynamics", "confidence/confidence", "split/split"):
        assert set(table(tmp_path / "run" / f"{name}.parquet")["id"]) == set(chosen)
    assert "12 of 29 examples selected by LongResponses" in capsys.readouterr().out
    assert not (finished.path / "selection").exists()


def test_another_selection_is_another_run(tiny, tmp_path):
    run(config(tiny, tmp_path / "run", selector=LongResponses()))
    with pytest.raises(ConfigError, match=r"selector\.k: 12 -> 10"):
        run(config(tiny, tmp_path / "run", selector=LongResponses(k=10)))
    others = [{"instruction": f"Say {i}.", "output": f"{i}", "kind": "x"} for i in range(20)]
    write_rows(tmp_path / "others.jsonl", others)
    changed = config(tiny, tmp_path / "run", selector=LongResponses())
    changed = replace(changed, data=replace(changed.data, train=str(tmp_path / "others.jsonl")))
    with pytest.raises(ConfigError, match="the training rows are others"):
        run(changed)


SEEN: list[tuple[int, int]] = []


class Recording(Perturbation):
    """Adds nothing and notes when it was asked to."""

    def embeddings(self, e, mask, *, ids, step, seed):
        SEEN.append((step, seed))
        return e


@pytest.mark.slow
def test_embeddings_are_perturbed_in_the_targets_training_steps_only(tiny, tmp_path):
    """Not while scoring, not in evaluation, not in the training of the reference or of the plain baseline."""
    SEEN.clear()
    run(config(tiny, tmp_path / "perturbed", perturbation=Recording(), with_baseline=True))
    run(config(tiny, tmp_path / "plain", with_baseline=True))
    steps = [step for step, seed in SEEN]
    assert set(steps) == {0, 1, 2, 3}
    assert {seed for _, seed in SEEN} == {42}
    segments = 4 * 2 * 2  # four steps of two micro-batches in two length groups
    assert len(steps) == segments
    for arm in ("train", "baseline"):
        losses = [[m["loss"] for m in metrics(tmp_path / name, arm)] for name in ("perturbed", "plain")]
        assert losses[0] == losses[1]
