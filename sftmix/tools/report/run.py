"""A finished run, read back for the report: its files, its rows, and what its models show of them."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.batches.order import RowSubset
from sftmix.cli.say import as_word
from sftmix.components.confidence import is_measured
from sftmix.config import RunConfig
from sftmix.disk.files import read_json
from sftmix.disk.tables import read_dynamics, read_split
from sftmix.pipeline.loaded import make_scorer
from sftmix.pipeline.rows import RunRows, table_of
from sftmix.ranks.world import start_world
from sftmix.tools.runs.loaded import load_finished
from sftmix.tools.runs.models import finished_models
from sftmix.tools.runs.read import check_finished
from sftmix.tools.runs.rows import rows_of_run
from sftmix.training.parallel import training_module
from sftmix.types import NOT_COUNTED, Batch, Float64, Rows, Scores, Split, TrainingDynamics
from sftmix.words.errors import ConfigError


@dataclass
class RunView:
    """A run with its rows; what it did not make is None.

    rows      as the target saw them
    scores    the table of the N training examples; confidence and variability are NaN without a reference
    split     the group of each
    dynamics  the reference's, of exactly these examples, in their order
    """

    path: Path
    config: RunConfig
    summary: dict[str, Any]
    rows: RunRows
    scores: Scores
    split: Split | None
    dynamics: TrainingDynamics | None

    @cached_property
    def by_confidence(self) -> Rows:
        """Rows with a confidence, least confident first; ties by place."""
        measured = np.flatnonzero(is_measured(self.scores.confidence))
        return measured[np.argsort(self.scores.confidence[measured], kind="stable")]

    @cached_property
    def correctness(self) -> Float64 | None:
        """f64[N], the share of response tokens that were the argmax, over the checkpoints; NaN if not counted."""
        if self.dynamics is None:
            return None
        correct = np.where(self.dynamics.n_correct == NOT_COUNTED, np.nan, self.dynamics.n_correct)
        # A row that was not scored has 0 tokens, and NaN.
        return correct.mean(axis=1) / np.where(self.dynamics.scored, self.dynamics.n_tokens, np.nan)


def look(view: RunView, stage: str, rows: Rows, *, hidden: bool = False) -> np.ndarray | None:
    """Pass K training examples through a model of the run, in this process alone; None if it did not export it.

    stage  base, train or baseline
    Returns f64[K], their mean NLL per response token in nats; with `hidden` f32[K, D], the input of the LM head at
    the last response token before the end of the turn.
    """
    try:
        (finished,) = finished_models(view.path, ["target" if stage == "train" else stage])
    except ConfigError:
        return None
    data = RowSubset(view.rows.data.train, rows)
    options = replace(view.config.training, parallel="ddp")  # of one rank: the model as it is
    with start_world() as world:
        loaded = load_finished(finished, "float32")
        score = make_scorer(options, world, loaded.encoder, name=f"report: {stage}")
        module = training_module(
            loaded.model,
            options,
            precision=score.precision,
            world=world,
            attention=view.config.model.attention,
            packed=view.rows.packed,
        )
        if hidden:
            return np.asarray(score.columns(module, data, _last)[0])
        scores = score(module, data)
    return scores.nll_sum / scores.n_tokens


def _last(module: Any, batch: Batch) -> list[Any]:
    """Return the hidden state at the last response token of each row, which alone leaves the device."""
    ends = batch.n_tokens.cumsum(0) - 1  # [3, 2] -> 2, 4 of hidden states [5, D]
    return [module.hidden_states(batch)[ends].float().cpu().numpy()]


def read_run(path: Path) -> RunView:
    """Read a run that has a confidence or a split, with its rows, which are read from their files (or the cache).

    Raises ConfigError if `path` is no such run, or its rows are no longer the ones that it was made from,
    DifferenceError for a changed stage.
    """
    check_finished(path)
    file = path / "summary.json"
    summary = read_json(file, stages=dict) if file.exists() else {"stages": {}}
    if summary["stages"].keys().isdisjoint(("confidence", "split", "train")):
        raise ConfigError(f"{path} is not finished; `sftmix status {as_word(path)}` says how far it is")
    config, rows = rows_of_run(path)
    ids = rows.data.train.ids
    split, dynamics = path / "split" / "split.parquet", path / "confidence" / "dynamics.parquet"
    confidence = path / "confidence" / "confidence.parquet"
    return RunView(
        path,
        config,
        summary,
        rows,
        table_of(rows.data.train, confidence if confidence.exists() else None),
        read_split(split, of=ids)[1] if split.exists() else None,
        read_dynamics(dynamics).of(ids) if dynamics.exists() else None,
    )
