"""Selection, confidence, groups and the summary, made again from what the stages before them recorded."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from sftmix.common.tables import read_confidence, read_dynamics, read_ids, read_split
from sftmix.common.world import World
from sftmix.components.base import Need
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_confidence, check_split
from sftmix.config import RunConfig
from sftmix.measure.summary import summarise
from sftmix.pipeline.rows import selected_ids
from sftmix.tools.verify.certificate import Finding
from sftmix.tools.verify.inputs import Inputs

RELATIVE = 1e-9
"""Largest relative difference of a confidence: another processor may round an exponential in another way."""


def check_groups(run: Path, inputs: Inputs, stages: Container[str]) -> list[Finding]:
    """Ask the components of the configuration again for those of `stages`, and compare their answers with the files.

    Each is made from the files of the stages before it, so that a difference shows in one place. Raises the errors of
    the components and of files that cannot be read.
    """
    config, rows = inputs.config, inputs.rows
    found = []
    if "selection" in stages:
        found.append(_selection(run / "selection" / "selected.parquet", inputs))
    confidence = run / "confidence" / "confidence.parquet"
    if "confidence" in stages:
        found.append(_confidence(confidence, config, rows.data.train.ids))
    if "split" in stages:
        scores = rows.table(confidence if "confidence" in stages else None)
        made = check_split(config.splitter, config.splitter.split(scores, seed=config.seed), scores)
        ids, recorded = read_split(run / "split" / "split.parquet")
        labels = np.asarray(recorded.labels), np.asarray(made.labels)
        found.append(_compared("split/split.parquet", (ids, scores.id), labels))
    return found


def _selection(path: Path, inputs: Inputs) -> Finding:
    recorded, made = {*read_ids(path)}, {*selected_ids(inputs.config, inputs.all_rows)}
    ids = sorted({*inputs.all_rows.ids, *recorded})
    kept = [np.asarray([one in chosen for one in ids]) for chosen in (recorded, made)]
    return _compared("selection/selected.parquet", (ids, ids), (kept[0], kept[1]))


def _confidence(path: Path, config: RunConfig, rows: Sequence[str]) -> Finding:
    dynamics = read_dynamics(path.parent / "dynamics.parquet").of(rows)
    estimated = check_confidence(config.confidence, config.confidence.estimate(dynamics), dynamics)
    ids, *recorded = read_confidence(path)
    made = np.stack([estimated, variability(dynamics)], axis=-1)
    return _compared("confidence/confidence.parquet", (ids, dynamics.ids), (np.stack(recorded, axis=-1), made))


def _compared(name: str, ids: tuple[Sequence[str], Sequence[str]], values: tuple[np.ndarray, np.ndarray]) -> Finding:
    """Compare the values [N] or [N, C] of N examples: first those of the run, then those that were made again."""
    if list(ids[0]) != list(ids[1]):
        return Finding("split", False, f"{name}: its examples are not those of the run", False)
    expected, found = values
    if np.issubdtype(found.dtype, np.floating):
        near = np.isclose(expected, found, rtol=RELATIVE, atol=0.0, equal_nan=True)
        exact = np.array_equal(expected, found, equal_nan=True)
    else:
        near, exact = expected == found, True
    wrong = np.flatnonzero(~near.reshape(len(found), -1).all(axis=1))
    if not len(wrong):
        how = "" if exact else f", within {RELATIVE:g}"
        return Finding("split", True, f"{name}, {len(found)} examples{how}", exact)
    told = f"{name}: {len(wrong)} of {len(found)} examples, {ids[0][wrong[0]]} first"
    return Finding("split", False, told, False, expected[wrong[0]].tolist(), found[wrong[0]].tolist())


def write_summary(run: Path, inputs: Inputs, to: Path) -> None:
    """Write summary.json, gathered again from the files of a run's stages, into the directory `to`."""
    config, split = inputs.config, run / "split/split.parquet"
    divided = read_split(split)[1] if split.exists() else None
    confidence = run / "confidence/confidence.parquet" if divided and Need.CONFIDENCE in config.splitter.needs else None
    summarise(
        run,
        World(),
        inputs.rows.data,
        inputs.rows.table(confidence),
        divided,
        model=config.model.path,
        seed=config.seed,
        to=to,
    )
