"""What is said of a split and of a finished run: confounds.json, histogram.json, summary.json, and remarks.

Confounds are other causes that may stand behind a split: length and labels. A high AUC or rank correlation says that
the two halves differ in the length of their responses, so a gain from mixing may come from length; RandomSplit and
LengthMatched are the controls. summary.json gathers the figures of all stages.
"""

import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import sftmix
from sftmix.common.files import read_json, read_steps, write_json
from sftmix.common.world import World
from sftmix.components.confidence import is_measured
from sftmix.data import DataReport
from sftmix.measure.model import confidence_std, finite
from sftmix.types import UNPAIRED_NAME, Float64, Scores, Split

_OF_STAGE = [
    "wall_seconds",
    "elapsed",
    "scoring_seconds",
    "calibration_seconds",
    "steps",
    "total_steps",
    "tokens",
    "examples",
    "peak_memory_bytes",
    "skipped",
]
_OF_ARM = [
    "eval_accuracy",
    "eval_exact_match",
    "eval_nll_as_trained",
    "eval_nll_best",
    "eval_nll_best_step",
    "eval_nll_best_epoch",
    "calibration",
    "eval_nll_by",
]
"""Figures of stages, and of a trained one, that the summary has."""

UNMOVED = 5e-3
"""Relative change of the held-out NLL below which a training is said to have hardly changed the model."""
WORSE = 1e-3
"""Relative rise of the held-out NLL above which a model is said to be worse than its base model."""
ROUNDED = 0.1
"""Share of the change of the held-out NLL by which the rounding of the export must move it to be worth a sentence."""
SHOWN = 1e-4
"""The last digit of a held-out NLL that people are shown."""
BETTER = 1e-3
"""Nats per token by which an earlier evaluation must be better before it is worth a sentence."""
DIVERGED = 1.2
"""Ratio of the last losses of a reference to its first ones above which its training did harm."""
TIED = 0.01
"""Share of the examples above which ties at the cut get a remark."""

BINS = 40
"""Bins of the histogram of confidence."""
MAX_LABELS = 12
"""Largest number of labels that are reported, the most frequent ones."""


# ------------------------------------------------------------------------------------------- the split


def describe_split(root: Path, scores: Scores, split: Split) -> tuple[list[str], dict[str, Any]]:
    """Write split/confounds.json and, if there is confidence, confidence/histogram.json under `root`.

    Return the files, relative to split/, and what the summary tells of the groups: `confidence`, `confounds`, and
    `tied`, the share of the examples that have the confidence of one in another group.
    """
    measured, groups, figures = is_measured(scores.confidence), {}, {}
    for group, name in enumerate(split.names):
        rows = split.rows(group)
        confidence = groups[name] = scores.confidence[rows[measured[rows]]]
        labels = Counter(str(scores.label[row]) for row in rows if scores.label)
        figures[name] = {
            "examples": len(rows),
            "confidence_mean": finite(np.mean, confidence),
            "confidence_std": finite(np.std, confidence),
            "confidence_median": finite(np.median, confidence),
            "response_tokens_mean": finite(np.mean, scores.n_tokens[rows]),
            "labels": {label: count / len(rows) for label, count in labels.items()},
        }
    figures[UNPAIRED_NAME] = {"examples": len(split.unpaired)}
    causes, files, panels = confounds(scores, split), ["confounds.json"], {"groups": groups}
    if by_label := labelled(scores):
        panels["labels"] = by_label
        causes["labels"] = {
            name: {"examples": len(v), "confidence_mean": float(v.mean()), "confidence_std": float(v.std())}
            for name, v in by_label.items()
        }
    write_json(root / "split" / "confounds.json", causes)
    if measured.any():
        write_json(root / "confidence" / "histogram.json", histogram(panels))
        files.append("../confidence/histogram.json")
    return files, {"confidence": figures, "confounds": causes, "tied": tied_at_the_cut(scores, split)}


def tied_at_the_cut(scores: Scores, split: Split) -> float:
    """Return the share of the examples that have the confidence of one in another group."""
    values_of_groups = np.unique(np.stack([scores.confidence, split.group]), axis=1)[0]
    values, n_groups = np.unique(values_of_groups, return_counts=True)
    return np.isin(scores.confidence, values[n_groups > 1]).mean().item()  # NaN equals nothing


def confounds(scores: Scores, split: Split) -> dict[str, Any]:
    """Return how far length stands behind a split; None for what is undefined.

    spearman_confidence_length  Spearman's correlation of confidence with response length, over the examples with a
                                finite confidence; equal values share the mean of their ranks
    auc_length_confident        P(x > y) + P(x = y) / 2 for the lengths x of the first group, y of the last
                                (Mann-Whitney U / (n_x n_y))
    """
    from scipy.stats import mannwhitneyu, rankdata

    measured, correlation, area = is_measured(scores.confidence), None, None
    if measured.sum() > 1:
        ranks = rankdata(np.stack([scores.confidence, scores.n_tokens], axis=1)[measured], axis=0)
        correlation = finite(lambda ranks: np.corrcoef(ranks, rowvar=False)[1, 0], ranks)
    first, last = scores.n_tokens[split.confident], scores.n_tokens[split.unconfident]
    if len(first) and len(last):
        area = float(mannwhitneyu(first, last, method="asymptotic").statistic) / (len(first) * len(last))
    return {"spearman_confidence_length": correlation, "auc_length_confident": area}


def histogram(panels: Mapping[str, Any]) -> dict[str, Any]:
    """Count every series of every panel in shared bins: {scale, edges, panels: {panel: {series: counts}}}.

    edges has BINS + 1 ascending numbers, every `counts` BINS. The bins are equally wide between the 0.5% and the 99.5%
    quantile, and the first and the last one also hold all values beyond.
    `scale` is "log" if all confidences are negative and the largest is ten times the smallest in size, as with
    perplexities: then the bins are equally wide in log(-confidence).
    """
    pooled = np.concatenate([v for series in panels.values() for v in series.values()])
    low, high = np.quantile(pooled, [0.005, 0.995])
    logarithmic = bool(high > low and pooled.max() < 0 and pooled.min() < 10 * pooled.max())
    edges = -np.geomspace(-low, -high, BINS + 1) if logarithmic else np.histogram_bin_edges([low, high], BINS)
    counts = {
        p: {s: np.histogram(v.clip(edges[0], edges[-1]), edges)[0].tolist() for s, v in series.items()}
        for p, series in panels.items()
    }
    return {"scale": "log" if logarithmic else "linear", "edges": edges.tolist(), "panels": counts}


def labelled(scores: Scores) -> dict[str, Float64]:
    """Return the finite confidences of the most frequent labels, most frequent first."""
    import pandas as pd

    table = pd.DataFrame({"label": scores.label, "confidence": scores.confidence})[is_measured(scores.confidence)]
    groups = table.groupby("label").confidence  # by name, without None
    frequent = groups.size().sort_values(ascending=False, kind="stable").index[:MAX_LABELS]
    return {name: groups.get_group(name).to_numpy() for name in frequent}


# ------------------------------------------------------------------------------------------- the run


def summarise(root: Path, world: World, report: DataReport, *, model: str, seed: int, to: Path) -> dict[str, Any]:
    """Write summary.json of the run directory `root` into the directory `to` (rank 0), and return it."""
    stages = {p.parent.name: read_json(p) for p in sorted(root.glob("*/figures.json"))}
    train, split = stages.get("train", {}), stages.get("split", {})
    summary = {
        **made_by(world.size),
        **train.get("made_by", {}),
        "model": model,
        "seed": seed,
        "data": report.to_dict(),
        "stages": {name: {k: figures[k] for k in _OF_STAGE if k in figures} for name, figures in stages.items()},
        "confounds": split.get("confounds", {}),
        "remarks": list(remarks(stages)),
    }
    if "confidence" in split:
        summary["confidence"] = split["confidence"]
    if train and "base" in stages:  # else it was stopped between the two
        summary["confounds"]["mixed_token_share"] = train["mixed_token_share"]
        summary["eval_nll_before"] = stages["base"].get("eval_nll")
        arms = [name for name in ("train", "baseline") if name in stages]
        for number, name in enumerate(arms):  # the target, and under `baseline` the same of the NTP run beside it
            told = {"eval_nll_after": stages[name].get("eval_nll")}
            told |= {figure: stages[name].get(figure) for figure in _OF_ARM}
            told["confidence_std"] = confidence_std(root, *arms[number:])
            summary |= told if name == "train" else {name: told}
        ntp, mixup = int(train["ntp_tokens"]), int(train["mixup_tokens"])
        summary |= {
            "ntp_tokens": ntp,
            "mixup_tokens": mixup,
            # Without any NTP, Mixup has no other term to be weighed against.
            "mu_effective": train["mu_effective"] if ntp or not mixup else None,
        }
    world.on_main(lambda: write_json(to / "summary.json", summary))
    return summary


@cache
def made_by(world_size: int) -> dict[str, object]:
    """Return version, revision and world size of this process; a finished training keeps those it was made by.

    The revision is that of this package's source tree, `+` if it was changed; None outside a checkout.
    """
    here, revision = Path(sftmix.__file__).resolve().parent.parent, None  # above the package
    if (here / ".git").exists():
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        with suppress(OSError):
            revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"version": sftmix.__version__, "git_revision": revision, "world_size": world_size}


# ------------------------------------------------------------------------------------------- remarks


def ends_of_loss(stage: Path) -> dict[str, float]:
    """Return the loss per token of the first and of the last steps of a stage: a tenth of all, or 8, or half.

    Steps whose loss was not finite are left out; {} with fewer than two others. It is weighted by tokens, because the
    last step of an epoch may hold a single short response.
    """
    lines = [line for line in read_steps(stage) if line["loss"] is not None and line["ntp_tokens"]]
    size, means = min(len(lines) // 2, max(8, len(lines) // 10)), {}
    for name, end in (("loss_first", lines[:size]), ("loss_last", lines[-size:])):
        if size:
            tokens = [line["ntp_tokens"] for line in end]
            means[name] = float(np.average([line["loss"] for line in end], weights=tokens))
    return means


def remarks(stages: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sentences about split, trained reference and target of a run; none if nothing is wrong.

    stages  stage -> its figures
    """
    if (tied := stages.get("split", {}).get("tied", 0)) > TIED:
        yield (
            f"{tied:.0%} of the examples have the same confidence as one on the other side of the cut, so confidence "
            "does not divide them (Median and Quantile order them by id)."
        )
    reference = stages.get("reference", {})
    first, last = reference.get("loss_first"), reference.get("loss_last")
    if first is not None and last > DIVERGED * first:
        yield (
            f"The training of the reference diverged: its loss was {first:.4f} per token in the first steps and "
            f"{last:.4f} in the last, so the confidence says little about the examples. Try a smaller "
            "--training.learning_rate (or --reference.training.learning_rate, if that is set) in another --out."
        )
    if "train" not in stages:
        return
    train, before = stages["train"], stages.get("base", {}).get("eval_nll")
    steps, skipped = train["steps"], int(train["skipped"])
    if skipped:
        yield (
            f"{skipped} of {steps} steps were skipped, since their gradients were not finite: if they are many, lower "
            "--training.learning_rate, or look for bad rows."
        )
    if train["stopped_by"]:
        yield f"{train['stopped_by']} stopped the training early, after step {steps} of {train['total_steps']}."
    after, best = train.get("eval_nll"), train.get("eval_nll_best")
    if after is None or best is None or skipped == steps:
        return
    if before is not None and max(abs(after / before - 1), abs(best / before - 1)) < UNMOVED:
        yield (
            f"The training hardly changed the model: NLL per token {before:.4f} before, {after:.4f} after {steps} "
            "steps. Try a larger --training.learning_rate (models below 100M parameters often need 1e-4 to 1e-3) or "
            "more --training.epochs."
        )
    elif before is not None and after > before * (1 + WORSE):
        yield (
            f"The trained model is worse than the base model on the held-out rows: NLL per token {before:.4f} before, "
            f"{after:.4f} after. Try a smaller --training.learning_rate or fewer --training.epochs."
        )
    end = train.get("eval_nll_as_trained") or after
    if before is not None and abs(after - end) > max(ROUNDED * abs(before - after), SHOWN):
        yield (
            f"Rounding the weights for train/model moved the held-out NLL per token from {end:.4f} to {after:.4f} "
            f"({before:.4f} before training): --checkpoint.rounding stochastic keeps more of a training than nearest, "
            "and --model.dtype float32 all of it."
        )
    if end - best > BETTER:
        yield (
            f"The best evaluation was at step {train['eval_nll_best_step']} of {steps}: held-out NLL {best:.4f}, "
            f"{end:.4f} at the end; with --checkpoint.keep_best true, sftmix export RUN --best writes its model."
        )
