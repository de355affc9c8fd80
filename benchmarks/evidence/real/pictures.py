"""Draw three pictures of docs/results.md from what was collected. It needs matplotlib: `.[bench]`.

    python benchmarks/evidence/real/pictures.py
    python benchmarks/evidence/real/pictures.py --hidden runs/real/gemma-main/NTP/seed-1

real-differences.svg   SFTMix minus each other arm, in every table that has runs, at both endpoints
real-confidence.svg    perplexities before and after the training; SmolLM2 beside Gemma; the paper's Figure 1: t-SNE of
                       the hidden states of a run, as `sftmix report` has it
overfit-best.svg       the differences of the second tier of the study at the best epoch

The map of the hidden states is in real-hidden.csv, which --hidden writes: places are shares of its width and height.
A phone shows all letters in a legible size.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.findings import BEST, LAST, MARGIN, findings  # noqa: E402
from benchmarks.evidence.real.confidences import FILE, agreement  # noqa: E402
from benchmarks.evidence.tiers import REAL, RESULTS, Tier, read_tier  # noqa: E402

IMAGES = ROOT / "docs" / "images" / "results"
HIDDEN = RESULTS / "real-hidden.csv"
WIDTH = 4.8
"""Inches: a phone shows it at four fifths of its size."""
BLUE, BROWN, GREY = "#1769aa", "#b3541e", "#7a828c"
WORDS = {
    "NTP-shuffled": "NTP, shuffled",
    "RandomSplit": "random halves",
    "DecomposedMixup": "losses added up",
    "LengthMatched": "halves of like length",
    "SFTMix-ntp": "literal sum",
}
"""Arms that docs/results.md names otherwise than by their classes."""
ENDS = {LAST: ("last step", BLUE, -0.15), BEST: ("best epoch", BROWN, 0.15)}
mpl.rcParams |= {
    "svg.hashsalt": "sftmix",  # the same file from the same figures
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def differences(path: Path) -> None:
    """Draw a panel for each table: a line for each contrast, its seeds as points, mean and 95% interval."""
    tiers = [tier for name in REAL if (tier := read_tier(name)).common]
    figure, panels = plt.subplots(-(-len(tiers) // 2), 2, figsize=(WIDTH, 5.6), sharey=True, squeeze=False)
    for panel, tier in zip(panels.flat, tiers, strict=False):
        _differences(panel, tier)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="upper center", ncols=2)
    for panel in panels.flat[len(tiers) :]:  # of an odd number of tables
        panel.remove()
    figure.supxlabel("difference in held-out NLL, nats per token\nbelow 0: SFTMix is better", fontsize=10)
    save(figure, path, top=0.95)


def _differences(panel: Axes, tier: Tier) -> None:
    panel.set_title(tier.title.replace(", ", ",\n", 1))
    panel.axvspan(-MARGIN, MARGIN, color="#e4f0e4", lw=0)
    panel.axvline(0, color=GREY, lw=0.8)
    for end, (name, colour, off) in ENDS.items():
        found = findings(tier, end, tier.contrasts, tested=False)
        for place, finding in enumerate(found):
            label, values = name if place == 0 else None, [*finding.differences.values()]
            draw_seeds(panel, values, finding.interval, place + off, colour, label)
    panel.set_yticks(range(len(tier.contrasts)), [f"− {WORDS.get(other, other)}" for _, other in tier.contrasts])
    panel.set_ylim(len(tier.contrasts) - 0.5, -0.5)
    panel.locator_params(axis="x", nbins=4)


def tier_at_best(path: Path, name: str) -> None:
    """Draw the contrasts of a tier of the study at the best epoch, and the other arms beside its baseline."""
    tier = read_tier(name)
    beside = [(arm, tier.baseline) for arm in tier.arms if arm != tier.baseline]
    figure, panel = plt.subplots(figsize=(WIDTH, 4.4))
    panel.axvspan(-MARGIN, MARGIN, color="#e4f0e4", lw=0)
    panel.axvline(0, color=GREY, lw=0.8)
    found = findings(tier, BEST, list(dict.fromkeys([*tier.contrasts, *beside])), tested=False)
    for place, finding in enumerate(found):
        draw_seeds(panel, [*finding.differences.values()], finding.interval, place, BROWN, None)
    named = [" − ".join(WORDS.get(arm, arm) for arm in finding.pair) for finding in found]
    panel.set_yticks(range(len(found)), named)
    panel.set_ylim(len(found) - 0.5, -0.5)
    figure.supxlabel("difference in held-out NLL at the best epoch, nats\nbelow 0: the first is better", fontsize=10)
    save(figure, path)


def draw_seeds(
    panel: Axes, values: ArrayLike, bounds: Sequence[float] | None, y: float, colour: str, label: str | None
) -> None:
    """Draw the values of the seeds as points at height y, their mean, and an interval if there is one."""
    values = np.asarray(values)
    panel.plot(values, np.full(len(values), y), "o", color=colour, ms=3, alpha=0.4, mew=0)
    panel.plot(values.mean(), y, "D", color=colour, ms=5, label=label)
    if bounds is not None:
        low, high = bounds
        panel.hlines(y, low, high, color=colour, lw=1.5)


def confidence(path: Path) -> None:
    """Draw the spread of the perplexities, the agreement of two models, and the map of the hidden states."""
    table = pd.read_csv(FILE, index_col="id")
    names = [name.removesuffix(" after") for name in table if name.endswith(" after")]
    figure, (first, second, third) = plt.subplots(3, 1, figsize=(WIDTH, 9.6))
    spread(first, table, names)
    agree(second, table, "SmolLM2", "Gemma")
    hidden_map(third, pd.read_csv(HIDDEN))
    save(figure, path)


def spread(panel: Axes, table: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw two boxes for each model: its perplexities before the training, and at the last scoring."""
    for k, name in enumerate(names):
        for off, (when, colour) in enumerate((("before", GREY), ("after", BLUE))):
            panel.boxplot(
                table[f"{name} {when}"].dropna(),
                positions=[3 * k + off],
                widths=0.8,
                whis=(5, 95),
                showfliers=False,
                patch_artist=True,
                boxprops={"facecolor": colour, "alpha": 0.5, "linewidth": 0},
                medianprops={"color": "black"},
            )
    panel.set_yscale("log")
    panel.set_xticks([3 * k + 0.5 for k in range(len(names))], [f"{name}\nbefore, after" for name in names])
    panel.set_title("perplexity of the responses\n(boxes: quartiles; lines: 5 to 95%)")


def agree(panel: Axes, table: pd.DataFrame, one: str, other: str) -> None:
    """Draw each row at its perplexities under two models, averaged over the training of each reference."""
    columns = [table[f"{name} mean"] for name in (one, other)]
    correlation, same = agreement(*columns)
    x, y = (column[same.index] for column in columns)
    panel.loglog(x[same], y[same], "o", ms=3, alpha=0.6, mew=0, color=BLUE, label="in the same half")
    panel.loglog(x[~same], y[~same], "o", ms=3, alpha=0.8, mew=0, color=BROWN, label="in different halves")
    panel.set(xlabel=f"mean perplexity, {one}", ylabel=f"mean perplexity, {other}")
    panel.set_title(f"rank correlation {correlation:.2f}, {same.mean():.0%} in the same half")
    panel.legend()


def hidden_map(panel: Axes, places: pd.DataFrame) -> None:
    """Draw the rows of both ends at their places: end ("least" or "most"), x and y."""
    for end, colour in (("least", BROWN), ("most", BLUE)):
        part = places[places.end == end]
        panel.plot(part.x, part.y, "o", ms=3.5, alpha=0.7, mew=0, color=colour, label=f"{len(part)} {end} confident")
    panel.set(xticks=[], yticks=[])
    panel.set_title("t-SNE of the last hidden states (the paper's Figure 1)")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2)


def look_at_hidden(run: Path) -> None:
    """Write t-SNE of the last hidden states of a run's model for the rows of both ends, a quarter each."""
    from sftmix.tools.report.pictures import tsne
    from sftmix.tools.report.run import look, read_run

    view = read_run(run)
    end = len(view.by_confidence) // 4
    rows = np.concatenate([view.by_confidence[:end], view.by_confidence[-end:]])
    states = look(view, "train", rows, hidden=True)
    assert states is not None, f"{run} has no exported model"
    places = pd.DataFrame(tsne(states), columns=["x", "y"])
    places = (places - places.min()) / (places.max() - places.min())
    places.insert(0, "end", np.repeat(["least", "most"], end))
    places.round(4).to_csv(HIDDEN, index=False)


def save(figure: plt.Figure, path: Path, top: float = 1.0) -> None:
    """Save a figure whose panels end at a share of its height, under a legend."""
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, metadata={"Date": None})
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=Path, help="a finished run, whose hidden states are looked at anew")
    options = parser.parse_args()
    if options.hidden:
        look_at_hidden(options.hidden)
    differences(IMAGES / "real-differences.svg")
    confidence(IMAGES / "real-confidence.svg")
    tier_at_best(IMAGES / "overfit-best.svg", "overfit")


if __name__ == "__main__":
    main()
