"""The secondary endpoints of a tier: means, standard deviations, and paired differences to the baseline; no tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

from benchmarks.evidence.tiers import Figure, Summary, Tier
from sftmix.tools.compare.statistics import mean_sd


class Secondary(NamedTuple):
    """A figure of a run: its name on the page, where it is, its decimals, and whether it is told as a ratio."""

    name: str
    figure: Figure
    digits: int = 4
    ratio: bool = False


def _at(dotted: str) -> Figure:
    """Return the figure of this name in a summary, None where it has none."""

    def figure(summary: Summary) -> float | None:
        return reduce(lambda found, key: found.get(key) if found else None, dotted.split("."), summary)  # type: ignore

    return figure


def _of_quartile(k: int) -> Figure:
    return lambda summary: summary["eval_nll_by_length"][k]["nll"]


def _of_half(half: str, when: str) -> Figure:
    def figure(summary: Summary) -> float | None:
        found: dict[str, Any] = summary.get("sample_nll_by_half", {}).get(when, {})
        return found[half]["nll"] if half in found else None

    return figure


def _best_epoch(summary: Summary) -> float:
    return summary["eval_nll_best_epoch"] + 1  # kept counted from 0


TEMPERATURE, LOG_SPREAD = _at("calibration.temperature"), _at("confidence_std.log_after")

SECONDARY = (
    Secondary("NLL, temperature scaled", _at("calibration.nll_temperature_scaled")),
    Secondary("temperature", TEMPERATURE, 3),
    Secondary("token ECE", _at("calibration.ece")),
    Secondary("Brier score", _at("calibration.brier")),
    Secondary("sd of confidence", _at("confidence_std.after"), 1, ratio=True),
    Secondary("sd of log confidence", LOG_SPREAD, ratio=True),
    Secondary("NLL, shortest quarter", _of_quartile(0)),
    Secondary("NLL, second quarter", _of_quartile(1)),
    Secondary("NLL, third quarter", _of_quartile(2)),
    Secondary("NLL, longest quarter", _of_quartile(3)),
    Secondary("sample of training rows, confident: before", _of_half("confident", "before")),
    Secondary("sample of training rows, confident: after", _of_half("confident", "after")),
    Secondary("sample of training rows, unconfident: before", _of_half("unconfident", "before")),
    Secondary("sample of training rows, unconfident: after", _of_half("unconfident", "after")),
    Secondary("share of tokens mixed", _at("confounds.mixed_token_share"), 3),
    Secondary("mu_effective", _at("mu_effective"), 3),
    Secondary("best epoch, from 1", _best_epoch, 1),
)


def relative(tier: Tier, arm: str, figure: Figure) -> list[float]:
    """Return the figure of an arm over the baseline's, minus 1, for each seed that both have."""
    base = tier.values(tier.baseline, figure)
    return [value / base[seed] - 1 for seed, value in tier.values(arm, figure).items() if seed in base]


def absolute_rows(tier: Tier) -> Iterator[Sequence[str]]:
    """Yield name, then mean ± standard deviation of each arm."""
    for each in SECONDARY:
        values = [list(tier.values(arm, each.figure).values()) for arm in tier.arms]
        if any(values):
            yield (each.name, *(_spread(found, f",.{each.digits}f") for found in values))


def paired_rows(tier: Tier) -> Iterator[Sequence[str]]:
    """Yield name, then mean ± standard deviation of the paired difference, or ratio, of each arm to the baseline.

    A figure that no arm changes at any seed, such as a loss before training, has no row.
    """
    arms = [arm for arm in tier.arms if arm != tier.baseline]
    for each in SECONDARY:
        if each.ratio:
            values = [relative(tier, arm, each.figure) for arm in arms]
        else:
            values = [list(tier.differences((arm, tier.baseline), each.figure).values()) for arm in arms]
        if any(map(any, values)):
            yield (each.name, *(_spread(found, "+.1%" if each.ratio else f"+,.{each.digits}f") for found in values))


def _spread(values: Sequence[float], form: str) -> str:
    """Write mean ± standard deviation; "-" without a value."""
    if not values:
        return "-"
    mean, sd = mean_sd(values)
    return f"{mean:{form}}" + ("" if sd is None else f" ± {sd:{form.lstrip('+')}}")
