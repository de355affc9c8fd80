"""What happened in a run, in sentences with numbers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sftmix.common.figures import short
from sftmix.common.tables import read_eval
from sftmix.config.values import EXAMPLES
from sftmix.measure.split import MAX_LABELS
from sftmix.tools.report.run import RunView


def sentences(view: RunView) -> list[str]:
    """Return what the page says first: rows, split, length, Mixup beside the baseline, and what one seed can say."""
    return [*view.summary.get("remarks", []), *_rows(view), *_split(view), *_length(view), *_outcome(view)]


def _rows(view: RunView) -> Iterator[str]:
    data = view.rows.data
    held_out = f", {len(data.eval):,} are held out" if data.eval is not None else ", none is held out"
    tokens = int(data.train.n_targets.sum())
    yield f"{len(data.train):,} examples with {tokens:,} response tokens are the training set{held_out}."


def _split(view: RunView) -> Iterator[str]:
    groups = {name: g for name, g in view.summary.get("confidence", {}).items() if g["examples"]}
    named = []
    for name, group in groups.items():
        figures = [f"{group['examples']:,} {name}"]
        if group.get("confidence_median") is not None:
            figures.append(f"median confidence {short(group['confidence_median'])}")
        if group.get("response_tokens_mean") is not None:
            figures.append(f"{group['response_tokens_mean']:.0f} response tokens on average")
        named.append(f"{figures[0]} ({', '.join(figures[1:])})" if figures[1:] else figures[0])
    if named:
        yield f"The split: {'; '.join(named)}."
    empty = "(empty)"
    shares = {name: group["labels"] for name, group in groups.items() if group.get("labels")}
    if shares and max(map(len, shares.values())) <= MAX_LABELS:
        listed = "; ".join(
            f"{name}: {', '.join(f'{label or empty} {share:.0%}' for label, share in of.items())}"
            for name, of in shares.items()
        )
        yield f"Labels in the groups, which the split did not see unless it is made of them: {listed}."


def _length(view: RunView) -> Iterator[str]:
    confounds = view.summary.get("confounds", {})
    rank, area = (confounds.get(key) for key in ("spearman_confidence_length", "auc_length_confident"))
    if rank is not None and area is not None:
        strength = abs(area - 0.5)
        verdict = (
            "most of what the split sees"
            if strength > 0.3
            else "part of what the split sees"
            if strength > 0.1
            else "little of what the split sees"
        )
        end = "longer" if area > 0.5 else "shorter"
        yield (
            f"Response length is {verdict}: the confident responses are the {end} ones with a probability of "
            f"{0.5 + strength:.0%} (50%: length says nothing; rank correlation with confidence {rank:.2f}). The "
            "splitters LengthMatched and RandomSplit are the controls."
        )


def _outcome(view: RunView) -> Iterator[str]:
    summary, name = view.summary, view.objective
    before, after = summary.get("eval_nll_before"), summary.get("eval_nll_after")
    share = summary.get("confounds", {}).get("mixed_token_share")
    if summary.get("mixup_tokens"):
        mixed = f"{share:.0%} of the response tokens" if share is not None else "Response tokens"
        effective = summary.get("mu_effective")
        weighed = f"; per token, Mixup weighs {effective:.2f} of NTP (mu_effective)" if effective else ""
        yield f"{mixed} met a token of another example in the Mixup term{weighed}."
    if after is None:
        yield "No rows were held out, so this run cannot say whether the training helped."
        return
    from_base = "" if before is None else f" from {before:.4f} of the base model"
    yield f"{name} brought the held-out NLL to {after:.4f} nats per response token{from_base}."
    if summary.get("baseline"):
        yield _beside_baseline(view, name)
        yield from _narrowing(summary)


def _beside_baseline(view: RunView, name: str) -> str:
    theirs = view.summary["baseline"]["eval_nll_after"]
    difference, error = paired_difference(view)
    words = ["sftmix", "compare", "--config", str(view.path / "config.yaml"), "--with_baseline", "false"]
    table = shlex.join([*words, "--variants", EXAMPLES["variants"], "--out", f"{view.path}-table"])
    spread = "" if error is None else f", with a standard error of {error:.4f} over the held-out examples alone"
    return (
        f"The NTP baseline, from the same model on the same rows in the same order, reached {theirs:.4f}: {name} is "
        f"{_apart(difference)}{spread}. This is one seed: how much another seed would move it is not known here, and "
        f"differences between seeds are often larger. `{table}` measures it."
    )


def _apart(difference: float) -> str:
    if abs(difference) < 5e-5:
        return "the same to four digits"
    return f"{abs(difference):.4f} nats {'lower (better)' if difference < 0 else 'higher (worse)'}"


def paired_difference(view: RunView) -> tuple[float, float | None]:
    """Return target - baseline in held-out NLL per token, and its standard error over examples (ratio estimator).

    The error of a single example is not known: None.
    """
    ids, ours, _ = read_eval(view.path / "train" / "eval.parquet")
    other, theirs, _ = read_eval(view.path / "baseline" / "eval.parquet")
    place = {i: k for k, i in enumerate(other)}
    order = np.asarray([place[i] for i in ids])
    off, tokens = ours.nll_sum - theirs.nll_sum[order], ours.n_tokens
    mean = off.sum() / tokens.sum()
    residual = off - mean * tokens
    n = len(ids)
    error = math.sqrt(n / (n - 1) * float((residual**2).sum())) / float(tokens.sum()) if n > 1 else None
    return float(mean), error


def _narrowing(summary: Mapping[str, Any]) -> Iterator[str]:
    spread = summary.get("confidence_std") or {}
    ratio = spread.get("log_vs_baseline")
    if ratio is not None:
        yield (
            f"The standard deviation of the examples' NLL per token, over a sample of {spread['rows']:,} rows, "
            f"is {abs(ratio):.1%} {'smaller' if ratio < 0 else 'larger'} than after NTP (the paper: 7% "
            "smaller, of the perplexity)."
        )
