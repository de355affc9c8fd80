"""Other causes that may stand behind a split: length, duplicates, labels. Written with the split.

A high AUC or rank correlation says that the two halves differ in the length of their responses, so a gain from mixing
may come from length; RandomSplit and LengthMatched are the controls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.files import write_json
from sftmix.common.rng import generator, stable_hash
from sftmix.components.confidence import is_measured
from sftmix.data import EncodedDataset
from sftmix.measure.histogram import histogram
from sftmix.measure.ranks import auc, equal_mass_bins, spearman
from sftmix.types import Float64, Int64, Rows, Scores, Split

MAX_LABELS = 12
"""Largest number of labels that are reported, the most frequent ones."""

TIED = 0.01
"""Share of the examples above which ties at the cut get a remark."""

SHUFFLES = 200
"""Random exchanges of the labels behind `overlap_if_unrelated`."""


def write_confounds(root: Path, scores: Scores, split: Split, data: EncodedDataset) -> list[str]:
    """Write split/confounds.json and, if there is confidence, confidence/histogram.json under `root`.

    Return the files, relative to split/.
    """
    prompts, contents = content_keys(data)
    found = {
        "spearman_confidence_length": length_correlation(scores),
        "auc_length_confident": auc(scores.n_tokens[split.confident], scores.n_tokens[split.unconfident]),
        "duplicates": duplicates(split, prompts, contents),
        **by_label(scores),
    }
    write_json(root / "split" / "confounds.json", found)
    if not is_measured(scores.confidence).any():
        return ["confounds.json"]
    groups = {name: scores.confidence[split.rows(g)] for g, name in enumerate(split.names)}
    labels = {name: scores.confidence[rows] for name, rows in _labelled(scores).items()}
    counted = histogram({"groups": groups, "labels": labels} if labels else {"groups": groups})
    write_json(root / "confidence" / "histogram.json", counted)
    return ["confounds.json", "../confidence/histogram.json"]


def length_correlation(scores: Scores) -> float | None:
    """Return Spearman's correlation of confidence with response length, over the examples with a finite confidence."""
    scored = is_measured(scores.confidence)
    return spearman(scores.confidence[scored], scores.n_tokens[scored])


def ties_at_the_cut(scores: Scores, split: Split) -> Iterator[str]:
    """Yield a remark if more than the share TIED of the examples have the confidence of one in another group."""
    values_of_groups = np.unique(np.stack([scores.confidence, split.group]), axis=1)[0]
    values, n_groups = np.unique(values_of_groups, return_counts=True)
    tied = np.count_nonzero(np.isin(scores.confidence, values[n_groups > 1]))  # NaN equals nothing
    if tied > TIED * len(scores):
        yield (
            f"{tied:,} of {len(scores):,} examples ({tied / len(scores):.0%}) have the same confidence as one on the "
            "other side of the cut, so confidence does not divide them (Median and Quantile order them by id)."
        )


# ------------------------------------------------------------------------------------------ duplicates


def content_keys(data: EncodedDataset) -> tuple[list[int | None], list[int]]:
    """Return two hashes per example: of all turns before the last (None if there are none: text), and of the whole."""
    prompts, contents = list[int | None](), []
    for example in data.examples():
        *before, last = ((m.role, m.content) for m in example.messages)
        prompt = stable_hash(*(part for turn in before for part in turn))
        prompts.append(prompt if before else None)
        contents.append(stable_hash(prompt, *last))
    return prompts, contents


def duplicates(split: Split, prompts: Sequence[int | None], contents: Sequence[int]) -> dict[str, int]:
    """Count the contents and prompts that the first and the last group share.

    examples_in_both             examples of either group whose whole content is also in the other
    prompts_in_both              different prompts that are in both
    examples_with_prompt_in_both examples of either group that have one of these prompts
    """

    def common(keys: Sequence[int | None]) -> tuple[int, int]:
        first, last = ({keys[row] for row in rows} for rows in (split.confident, split.unconfident))
        both = (first & last) - {None}
        either = [*split.confident, *split.unconfident]
        return len(both), sum(keys[row] in both for row in either)

    return {
        "examples_in_both": common(contents)[1],
        "prompts_in_both": common(prompts)[0],
        "examples_with_prompt_in_both": common(prompts)[1],
    }


# ---------------------------------------------------------------------------------------------- labels


def _labelled(scores: Scores) -> dict[str, Rows]:
    """Return the rows with a finite confidence of the most frequent labels, most frequent first."""
    if scores.label is None:
        return {}
    rows = defaultdict(list)
    for row in np.flatnonzero(is_measured(scores.confidence)).tolist():
        if scores.label[row] is not None:
            rows[str(scores.label[row])].append(row)
    frequent = sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: np.asarray(found, dtype=np.int64) for name, found in frequent[:MAX_LABELS]}


def by_label(scores: Scores) -> dict[str, object]:
    """Return the confidence of each label, and the overlap of the two most frequent ones (`overlap`)."""
    rows = _labelled(scores)
    found: dict[str, object] = {
        "labels": {
            name: {
                "examples": len(at),
                "confidence_mean": float(scores.confidence[at].mean()),
                "confidence_std": float(scores.confidence[at].std()),
            }
            for name, at in rows.items()
        }
    }
    if len(rows) > 1:
        (first, a), (second, b) = list(rows.items())[:2]
        values = scores.confidence[a], scores.confidence[b]
        found["label_overlap"] = {"labels": [first, second], **overlap(*values)}
    return found if rows else {}


def overlap(a: Float64, b: Float64) -> dict[str, float | int]:
    """Return the share that two histograms have in common: sum over bins of min(share of a, share of b), 0 to 1.

    Each bin holds equally many values of both samples together (`equal_mass_bins`), so any increasing change of the
    scale, such as perplexity to log-perplexity, leaves the figure as it is. There are sqrt(smaller sample) bins, 2 to
    20. With bins, two samples of one distribution differ, too: `overlap_if_unrelated` is the mean over random exchanges
    of labels.
    """
    n_bins = int(np.clip(np.sqrt(min(len(a), len(b))), 2, 20))
    bins = equal_mass_bins(np.concatenate([a, b]), n_bins)
    total = np.bincount(bins, minlength=n_bins)

    def shared(of_a: Int64) -> float:
        return float(np.minimum(of_a / len(a), (total - of_a) / len(b)).sum(axis=-1).mean())

    exchanged = generator(0, "label_overlap").multivariate_hypergeometric(total, len(a), size=SHUFFLES)
    real = np.bincount(bins[: len(a)], minlength=n_bins)
    return {"bins": n_bins, "overlap": shared(real), "overlap_if_unrelated": shared(exchanged)}


def mixing(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """Return how much of a training was mixed, from the figures of its stage.

    mixed_pairs_per_token  aligned token pairs / response tokens with NTP loss, of all steps
    mixed_token_share      distinct response tokens mixed at least once in an epoch / response tokens of that epoch
    """
    trained = figures["ntp_tokens"]
    return {
        "mixed_pairs_per_token": figures["mixup_tokens"] / trained if trained else None,
        "mixed_token_share": figures.get("mixed_token_share"),
    }
