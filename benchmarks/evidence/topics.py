"""The topics of the rows of a table, fitted to the instructions of its held-out rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

Topics = list[str | None]


def topics_of(run: Path, held_out: Sequence[str], sample: Sequence[str]) -> tuple[Topics, Topics]:
    """Return the topic of each held-out row and of each sampled training row, by its most typical words.

    None stands for a row without a text or a topic. Where the files of rows are not there any more, or scikit-learn is
    not installed, no row has a topic, and a line on stderr says why.

    run               its config.yaml names the files of rows, seen from the working directory
    held_out, sample  ids of the rows
    """
    if find_spec("sklearn") is None:
        return _none(held_out, sample, "scikit-learn is not installed: pip install 'sftmix[report]'")
    texts = _texts(run)
    if texts is None:
        return _none(held_out, sample, f"the files of rows that {run / 'config.yaml'} names are not there")
    from sftmix.tools.report.ends import fit_topics

    known = [i for i in held_out if i in texts]
    fitted = fit_topics([texts[i] for i in known])
    if fitted is None:
        return _none(held_out, sample, "the words of the held-out rows do not repeat")
    words: Topics = [*fitted.words, None]  # -1, no topic, is the last entry
    others = [i for i in sample if i in texts]
    of_others = fitted.of([texts[i] for i in others]) if others else fitted.of_fitted[:0]
    topic = {i: words[t] for i, t in zip(others, of_others.tolist(), strict=True)}
    topic |= {i: words[t] for i, t in zip(known, fitted.of_fitted.tolist(), strict=True)}
    return [topic.get(i) for i in held_out], [topic.get(i) for i in sample]


def _none(held_out: Sequence[str], sample: Sequence[str], why: str) -> tuple[Topics, Topics]:
    print(f"no topics are kept: {why}", file=sys.stderr)
    return [None] * len(held_out), [None] * len(sample)


def _texts(run: Path) -> Mapping[str, str] | None:
    """Return id -> instruction of all rows that a run was given; None where a file of them is not there."""
    from sftmix.config.read import read_config
    from sftmix.data import prepare
    from sftmix.options import as_list
    from sftmix.tools.report.run import text_of

    if not (run / "config.yaml").exists():
        return None
    config = read_config(run / "config.yaml")
    if not all(Path(name).exists() for name in (*as_list(config.data.train), *as_list(config.data.eval or []))):
        return None
    found: dict[str, str] = {}
    prepared = prepare(config.data, config.seed, progress=False)
    for side in filter(None, (prepared.train, prepared.eval)):
        examples = side.examples(side.records, whole=config.data.multi_turn == "whole")
        found |= {example.id: text_of(example)[0] for _, _, example in examples}
    return found
