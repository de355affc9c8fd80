"""Draw the two pictures of docs/results.md on real models, from what was collected. It needs matplotlib: `.[bench]`.

    python benchmarks/evidence/real/pictures.py --hidden runs/real/gemma-main/NTP/seed-1

real-differences.svg   SFTMix minus each other arm, in every table that has runs, at both endpoints
real-confidence.svg    only with --hidden: perplexities before and after the training; SmolLM2 beside Gemma; and of that
                       run the paper's Figure 1: t-SNE of the hidden states, as `sftmix report` has it
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
from benchmarks.evidence.tiers import REAL, Tier, read_tier  # noqa: E402

IMAGES = ROOT / "docs" / "images" / "results"
BLUE, BROWN, GREY = "#1769aa", "#b3541e", "#7a828c"
WORDS = {
    "NTP-shuffled": "NTP, shuffled",
    "RandomSplit": "random halves",
    "DecomposedMixup": "losses added up",
}
"""Arms that docs/results.md names otherwise than by their classes."""
ENDS = {LAST: ("last", BLUE, -0.15), BEST: ("best epoch", BROWN, 0.15)}
mpl.rcParams |= {
    "svg.hashsalt": "sftmix",  # the same file from the same figures
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def differences(path: Path) -> None:
    """Draw a panel for each table: a line for each contrast, its seeds as points, mean and 95% interval."""
    tiers = [tier for name in REAL if (tier := read_tier(name)).common]
    figure, panels = plt.subplots(-(-len(tiers) // 2), 2, figsize=(9, 5), sharey=True, squeeze=False)
    for panel, tier in zip(panels.flat, tiers, strict=False):
        _differences(panel, tier)
    panels.flat[1].legend(frameon=False, fontsize=8, loc="center left")  # where it hides no point
    for panel in panels.flat[len(tiers) :]:  # of an odd number of tables
        panel.remove()
    figure.supxlabel("difference in held-out NLL, nats per response token; below 0: SFTMix is better", fontsize=9)
    save(figure, path)


def _differences(panel: Axes, tier: Tier) -> None:
    panel.set_title(tier.title, fontsize=9)
    panel.axvspan(-MARGIN, MARGIN, color="#e4f0e4", lw=0)
    panel.axvline(0, color=GREY, lw=0.8)
    for end, (name, colour, off) in ENDS.items():
        found = findings(tier, end, tier.contrasts, tested=False)
        for place, finding in enumerate(found):
            label, values = name if place == 0 else None, [*finding.differences.values()]
            draw_seeds(panel, values, finding.interval, place + off, colour, label)
    panel.set_yticks(range(len(tier.contrasts)), [f"− {WORDS.get(other, other)}" for _, other in tier.contrasts])
    panel.set_ylim(len(tier.contrasts) - 0.5, -0.5)
    panel.locator_params(axis="x", nbins=5)


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


def confidence(path: Path, hidden: Path) -> None:
    """Draw the spread of the perplexities, the agreement of two models, and the map of the hidden states."""
    table = pd.read_csv(FILE, index_col="id")
    names = [name.removesuffix(" after") for name in table if name.endswith(" after")]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
    spread(left, table, names)
    agree(middle, table, "SmolLM2", "Gemma")
    hidden_map(right, hidden)
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
    panel.set_title("perplexity of the responses\n(boxes: quartiles; lines: 5 to 95%)", fontsize=9)


def agree(panel: Axes, table: pd.DataFrame, one: str, other: str) -> None:
    """Draw each row at its perplexities under two models, averaged over the training of each reference."""
    columns = [table[f"{name} mean"] for name in (one, other)]
    correlation, same = agreement(*columns)
    x, y = (column[same.index] for column in columns)
    panel.loglog(x[same], y[same], "o", ms=3, alpha=0.6, mew=0, color=BLUE, label="in the same half")
    panel.loglog(x[~same], y[~same], "o", ms=3, alpha=0.8, mew=0, color=BROWN, label="in different halves")
    panel.set(xlabel=f"mean perplexity over the training of {one}", ylabel=f"of {other}")
    panel.set_title(f"rank correlation {correlation:.2f},\n{same.mean():.0%} in the same half", fontsize=9)
    panel.legend(frameon=False, fontsize=8)


def hidden_map(panel: Axes, run: Path) -> None:
    """Draw t-SNE of the last hidden states of a run's model for the rows of both ends, a quarter each."""
    from sftmix.tools.report.pictures import tsne
    from sftmix.tools.report.run import look, read_run

    view = read_run(run)
    end = len(view.by_confidence) // 4
    rows = np.concatenate([view.by_confidence[:end], view.by_confidence[-end:]])
    states = look(view, "train", rows, hidden=True)
    assert states is not None, f"{run} has no exported model"
    for part, colour, name in zip(np.split(tsne(states), 2), (BROWN, BLUE), ("least", "most"), strict=True):
        panel.plot(*part.T, "o", ms=3.5, alpha=0.7, mew=0, color=colour, label=f"{end} {name} confident")
    panel.set(xticks=[], yticks=[])
    panel.set_title("t-SNE of the last hidden states\n(the paper's Figure 1)", fontsize=9)
    panel.legend(frameon=False, fontsize=8)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=Path, help="a finished run, for the map of hidden states")
    options = parser.parse_args()
    differences(IMAGES / "real-differences.svg")
    if options.hidden:
        confidence(IMAGES / "real-confidence.svg", options.hidden)


if __name__ == "__main__":
    main()
