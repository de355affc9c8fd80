"""Description of a split: confounds.json, and its groups.

Confounds are other causes that may be behind a split: length and labels. A high AUC or rank correlation says that the
two halves differ in the length of their responses, so a gain from mixing may come from length; RandomSplit and
LengthMatched are the controls.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.components.confidence import is_measured
from sftmix.disk.files import write_json
from sftmix.measure.model import finite
from sftmix.types import UNPAIRED_NAME, Float64, Scores, Split

MAX_LABELS = 12
"""Largest number of labels that are reported, the most frequent ones."""


def describe_split(root: Path, scores: Scores, split: Split) -> dict[str, Any]:
    """Write split/confounds.json under `root`.

    Return what the summary says about the groups: `confidence`, `confounds`, and `tied`, the share of the examples that
    have the confidence of one in another group.
    """
    measured = is_measured(scores.confidence)
    figures = {}
    for group, name in enumerate(split.names):
        rows = split.rows(group)
        confidence = scores.confidence[rows[measured[rows]]]  # without NaN and LEAST
        labels = Counter(str(scores.label[k]) for k in rows if scores.label and scores.label[k] is not None)
        figures[name] = {
            "examples": len(rows),
            "confidence_mean": finite(np.mean, confidence),
            "confidence_std": finite(np.std, confidence),
            "confidence_median": finite(np.median, confidence),
            "response_tokens_mean": finite(np.mean, scores.n_tokens[rows]),
            "labels": {label: count / len(rows) for label, count in labels.items()},
        }
    figures[UNPAIRED_NAME] = {"examples": len(split.unpaired)}
    causes = confounds(scores, split)
    if by_label := labelled(scores):
        causes["labels"] = {
            name: {"examples": len(v), "confidence_mean": float(v.mean()), "confidence_std": float(v.std())}
            for name, v in by_label.items()
        }
    write_json(root / "split" / "confounds.json", causes)
    return {"confidence": figures, "confounds": causes, "tied": tied_at_the_cut(scores, split)}


def tied_at_the_cut(scores: Scores, split: Split) -> float:
    """Return the share of the examples that have the confidence of one in another group."""
    # 3 2 | 2 1 -> 1 2 2 3, where 2 is there once for each group: two of four are tied.
    values_of_groups = np.unique(np.stack([scores.confidence, split.group]), axis=1)[0]
    values, n_groups = np.unique(values_of_groups, return_counts=True)
    return np.isin(scores.confidence, values[n_groups > 1]).mean().item()  # NaN equals nothing


def confounds(scores: Scores, split: Split) -> dict[str, Any]:
    """Return how far length is behind a split; None for what is undefined.

    spearman_confidence_length  Spearman's correlation of confidence with response length, over the examples whose
                                confidence is measured; equal values share the mean of their ranks
    auc_length_confident        P(x > y) + P(x = y) / 2 for the lengths x of the first group, y of the last
                                (Mann-Whitney U / (n_x n_y))
    """
    from scipy.stats import mannwhitneyu, rankdata

    measured = is_measured(scores.confidence)
    correlation = None
    area = None
    if measured.sum() > 1:
        ranks = rankdata(np.stack([scores.confidence, scores.n_tokens], axis=1)[measured], axis=0)
        correlation = finite(lambda ranks: np.corrcoef(ranks, rowvar=False)[1, 0], ranks)
    first, last = scores.n_tokens[split.confident], scores.n_tokens[split.unconfident]  # 5 3 | 2 1: an AUC of 1
    if len(first) and len(last):
        area = float(mannwhitneyu(first, last, method="asymptotic").statistic) / (len(first) * len(last))
    return {"spearman_confidence_length": correlation, "auc_length_confident": area}


def labelled(scores: Scores) -> dict[str, Float64]:
    """Return the measured confidences of the most frequent labels, most frequent first."""
    import pandas as pd

    table = pd.DataFrame({"label": scores.label, "confidence": scores.confidence})[is_measured(scores.confidence)]
    groups = table.groupby("label").confidence  # by name, without None
    frequent = groups.size().sort_values(ascending=False, kind="stable").index[:MAX_LABELS]
    return {name: groups.get_group(name).to_numpy() for name in frequent}
