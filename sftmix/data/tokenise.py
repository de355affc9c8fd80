"""Conversations -> rows of tokens to store; one process and several give the same result."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from sftmix.common.progress import progress_bar
from sftmix.data.conversations import Conversations, tokens_of, turns_of, whole_of
from sftmix.data.masks import SPLIT, Outcome, encode_examples
from sftmix.data.report import DataReport
from sftmix.data.store import AT_ONCE
from sftmix.data.templates import Encoder
from sftmix.types import Example, Int64

WORTH_A_PROCESS = 10_000
"""Conversations for which one more process is worth its start; data.num_proc overrules it."""
_AHEAD = 16
"""Parts per process that are given out together."""

Stored = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Tokenise:
    """Function: records -> the rows of their examples to store, and the report on them.

    whole     conversations are examples; else their turns are
    selected  None, or the ids of the examples to keep; others are neither stored nor counted. They say which
              conversations are split: a reference reads them as the target does, whatever its own template.
    """

    conversations: Conversations
    whole: bool
    encoder: Encoder
    max_length: int
    selected: frozenset[str] | None

    def __call__(self, records: Int64) -> tuple[Stored, DataReport]:
        stored, report = Stored(), DataReport()
        for example, outcome in self._outcomes(records):
            name = f"{example.id} ({example.source})"
            for reason in outcome.reasons:
                report.add(reason, f"{name}: {outcome.detail}" if outcome.detail else name)
            if outcome.ids:
                weights = [message.weight for message in example.messages if message.trained][: len(outcome.spans)]
                if weighted := set(weights) != {1.0}:
                    report.add("weighted", name)
                more = {"weights": weights if weighted else None, "truncated": "truncated" in outcome.reasons}
                stored.append(tokens_of(example, outcome.ids, outcome.spans) | more)
        return stored, report

    def _outcomes(self, records: Int64) -> Iterator[tuple[Example, Outcome]]:
        """Tokenise every example, in file order; behind a conversation that must be split follow its turns."""
        for example, outcome in self._encoded(list(self._examples(records))):
            split = outcome.reasons == [SPLIT]
            if split and self.selected is not None:  # its turns have no place among the ids
                outcome.reasons = ["split_alone"]
            yield example, outcome
            if split and self.selected is None:
                yield from self._encoded(turns_of(example))

    def _examples(self, records: Int64) -> Iterator[Example]:
        """Read the examples that are kept; a conversation of which turns are kept comes as these."""
        for row in self.conversations.read(records):
            if self.whole and (self.selected is None or row.id in self.selected):
                yield whole_of(row)
            else:
                yield from (turn for turn in turns_of(row) if self.selected is None or turn.id in self.selected)

    def _encoded(self, examples: list[Example]) -> Iterator[tuple[Example, Outcome]]:
        # Conversations with many turns make long lists: pieces of them keep memory bounded.
        for at in range(0, len(examples), AT_ONCE):
            part = examples[at : at + AT_ONCE]
            yield from zip(part, encode_examples(self.encoder, part, self.max_length), strict=True)


def tokenised(
    work: Tokenise, records: Int64, report: DataReport, *, processes: int | None, progress: bool
) -> Iterator[dict[str, Any]]:
    """Tokenise the records; yield the rows to store, in file order, and add the counts to `report`.

    processes  number of processes; None takes as many as there are cores, and fewer where there is little work
    """
    parts = [records[start : start + AT_ONCE] for start in range(0, len(records), AT_ONCE)]
    many = min(processes or default_processes(len(records)), max(len(parts), 1))
    done = map(work, parts) if many == 1 else _parallel(work, parts, many)
    with progress_bar("Tokenising", total=len(records), unit=" rows", delay=1, enabled=progress) as bar:
        for part, (stored, more) in zip(parts, done, strict=True):
            report.take(more)
            yield from stored
            bar.update(len(part))


def default_processes(conversations: int) -> int:
    """Number of cores of this process, or fewer where there is little work; 1 where forking is not safe."""
    if sys.platform != "linux":
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), conversations // WORTH_A_PROCESS))


# -------------------------------------------------------------------------------------- several processes


_work: Tokenise | None = None
"""The work of this process on each part, where it is a worker."""


def _parallel(work: Tokenise, parts: list[Int64], processes: int) -> Iterator[tuple[Stored, DataReport]]:
    """Run `map(work, parts)` in forked workers, which share the memory map and the tokenizer with this process."""
    # Spawned workers would import the user's script again, and need seconds to import transformers.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _begin, (work,)) as pool:
        for at in range(0, len(parts), _AHEAD * processes):  # what waits to be written is in memory
            yield from pool.map(_do, parts[at : at + _AHEAD * processes])


def _begin(work: Tokenise) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parent's threads are not in a fork


def _do(part: Int64) -> tuple[Stored, DataReport]:
    assert _work is not None
    return _work(part)
