"""Scores of rows by a function of a row, in a file that grows while they are made."""

import math
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.batches.order import TokenisedRows
from sftmix.disk.appended import append_batch, read_batches
from sftmix.disk.files import naming_damage
from sftmix.types import RowLosses, RowScorer
from sftmix.words.errors import ContractError
from sftmix.words.progress import progress_bar


def score_each(
    score: RowScorer, file: Path, data: TokenisedRows, *, of: str, threads: int, token_nll: bool
) -> RowLosses:
    """Return the scores of all rows: those that the file has, and the others, which are added to it as they come.

    of    hash of what is scored by what, which each score in the file has
    Raises DifferenceError for a file with other scores.
    Threads call the function of a row. Scores are on disk while they are made: a kill costs those under way. The first
    error of a row is raised once the scores under way are on disk.
    """
    failed = list[Exception]()

    def record(number: int) -> dict[str, Any] | None:
        try:
            if not failed:  # after the first error, waiting rows are passed over
                row = data[number]
                nll, correct = map(np.asarray, score(row))
                n_tokens = np.count_nonzero(row.target[1:])
                if not nll.shape == correct.shape == (n_tokens,):
                    raise ContractError(
                        f"a function of score_rows returned NLL {list(nll.shape)} and correct {list(correct.shape)} "
                        f"for {row.id}; allowed: one for each of its {n_tokens} response tokens"
                    )
                scores = {"nll": float(nll.sum()), "tokens": len(nll), "correct": int(correct.sum())}
                return {"id": row.id, "of": of, **scores, **({"token_nll": nll.tolist()} if token_nll else {})}
        except Exception as error:
            failed.append(error)
        return None

    with naming_damage(file):
        scored = {one["id"]: _checked(one, of, token_nll) for one in read_batches(file)}
    waiting = [number for number, name in enumerate(data.ids) if name not in scored]
    with (
        ThreadPool(threads) as pool,  # which waits for no thread when a signal ends this
        progress_bar("reference: scoring", total=len(data), done=len(scored), unit=" examples") as bar,
    ):
        for one in filter(None, pool.imap_unordered(record, waiting)):
            append_batch(file, [one])  # by this thread alone
            scored[one["id"]] = one
            bar.update()
    if failed:
        raise failed[0]
    # [N] each, in row order, whichever thread was first
    nll, tokens, correct = (np.array([scored[i][name] for i in data.ids]) for name in ("nll", "tokens", "correct"))
    each = {"token_nll": [np.array(scored[i]["token_nll"], dtype=np.float32) for i in data.ids]} if token_nll else {}
    return RowLosses(nll, tokens, correct, each)


def _checked(one: dict[str, Any], of: str, token_nll: bool) -> dict[str, Any]:
    """Return a score of a file; raise an error for what is none, or is of others than `of`."""
    each = one["token_nll"] if token_nll else []
    if one["of"] != of:
        raise ValueError("it has scores by another server or model, or of other rows")
    numbers = all(type(nll) is float and 0 <= nll < math.inf for nll in (one["nll"], *each))
    counts = type(one["tokens"]) is type(one["correct"]) is int and 0 <= one["correct"] <= one["tokens"] < 2**31
    if not numbers or not counts or len(each) not in (0, one["tokens"]):
        raise ValueError(f"the score of {one['id']!r} is none")
    return one
