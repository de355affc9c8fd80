"""Scores of single rows by a function that threads call, on disk while they are made: a kill costs those under way."""

from __future__ import annotations

from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from sftmix.common.files import append_batch, read_batches
from sftmix.common.progress import progress_bar
from sftmix.data import EncodedDataset
from sftmix.types import RowScorer, RowScores


def score_each(score: RowScorer, data: EncodedDataset, file: Path, *, threads: int) -> RowScores:
    """Return the scores of all rows: those that the file has, and the others, which are added to it as they come.

    The first error of a row is raised once the scores under way are on disk.
    """
    failed: list[Exception] = []

    def record(number: int) -> dict[str, str | float] | None:
        try:
            if not failed:
                row = data[number]
                nll, correct = score(row)
                return {"id": row.id, "nll": float(nll), "tokens": int(row.target[1:].sum()), "correct": int(correct)}
        except Exception as error:
            failed.append(error)
        return None

    scored = {one["id"]: one for one in read_batches(file)}
    waiting = [number for number, name in enumerate(data.ids) if name not in scored]
    with (
        ThreadPool(threads) as pool,  # which waits for no thread when a signal ends this
        progress_bar("reference: scoring", total=len(data), done=len(scored), unit=" examples") as bar,
    ):
        for one in filter(None, pool.imap_unordered(record, waiting)):
            append_batch(file, [one], sync=False)  # to wait for the disk at each row would be slower than a server
            scored[one["id"]] = one
            bar.update()
    for error in failed:
        raise error
    nll, tokens, correct = (np.array([scored[i][name] for i in data.ids]) for name in ("nll", "tokens", "correct"))
    return RowScores(nll, tokens, correct)
