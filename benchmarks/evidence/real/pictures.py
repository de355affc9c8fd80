"""Draw the two pictures of docs/results.md on real models, from what was collected. It needs matplotlib: `.[bench]`.

    python benchmarks/evidence/real/pictures.py --hidden runs/real/main/SFTMix/seed-1

real-differences.svg   SFTMix minus each other arm, in every table that has runs, at both endpoints
real-confidence.svg    perplexities before and after the training; SmolLM2 beside Gemma; and with --hidden, the run of a
                       table, the paper's Figure 1: t-SNE of the hidden states, as `sftmix report` has it
"""

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.findings import BEST, LAST, MARGIN, Finding, findings  # noqa: E402
from benchmarks.evidence.real.confidences import FILE  # noqa: E402
from benchmarks.evidence.tiers import REAL, Tier, read_tier  # noqa: E402

IMAGES = ROOT / "docs" / "images" / "results"
TITLES = dict(
    zip(
        REAL,
        (
            "SmolLM2, 320 rows, 2 epochs",
            "SmolLM2, 80 rows, 8 epochs",
            "Gemma, 320 rows, 2 epochs",
            "Gemma, 80 rows, 8 epochs",
        ),
        strict=True,
    )
)
ENDS = {LAST: ("last", "#1769aa", -0.15), BEST: ("best epoch", "#b3541e", 0.15)}
LEAST, MOST = "#b3541e", "#1769aa"
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
    figure, panels = plt.subplots(1, len(tiers), figsize=(1 + 4 * len(tiers), 2.7), sharey=True, squeeze=False)
    for panel, tier in zip(panels[0], tiers, strict=True):
        _differences(panel, tier)
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.supxlabel("difference in held-out NLL, nats per response token; below 0: SFTMix is better", fontsize=9)
    save(figure, path)


def _differences(panel: Axes, tier: Tier) -> None:
    panel.set_title(TITLES[tier.name], fontsize=9)
    panel.axvspan(-MARGIN, MARGIN, color="#e4f0e4", lw=0)
    panel.axvline(0, color="#7a828c", lw=0.8)
    for end, (name, colour, off) in ENDS.items():
        found = findings(tier, end, tier.contrasts, tested=False)
        for place, finding in enumerate(found):
            _line(panel, finding, place + off, colour, name if place == 0 else None)
    panel.set_yticks(range(len(tier.contrasts)), [f"− {other}" for _, other in tier.contrasts])
    panel.set_ylim(len(tier.contrasts) - 0.5, -0.5)


def _line(panel: Axes, finding: Finding, y: float, colour: str, label: str | None) -> None:
    values = list(finding.differences.values())
    panel.plot(values, [y] * len(values), "o", color=colour, ms=3, alpha=0.4, mew=0)
    panel.plot(finding.mean, y, "D", color=colour, ms=5, label=label)
    if finding.interval is not None:
        low, high = finding.interval
        panel.hlines(y, low, high, color=colour, lw=1.5)


def confidence(path: Path, hidden: Path | None) -> None:
    """Draw the spread of the perplexities, the agreement of two models, and the map of the hidden states."""
    table = pd.read_csv(FILE, index_col="id")
    names = [name.removesuffix(" after") for name in table if name.endswith(" after")]
    figure, (spread, agree, places) = plt.subplots(1, 3, figsize=(11, 3.4))
    for k, name in enumerate(names):
        for off, (when, colour) in enumerate((("before", "#7a828c"), ("after", MOST))):
            box = {"facecolor": colour, "alpha": 0.5, "linewidth": 0}
            values = table[f"{name} {when}"].dropna()
            spread.boxplot(
                values,
                positions=[3 * k + off],
                widths=0.8,
                whis=(5, 95),
                showfliers=False,
                patch_artist=True,
                boxprops=box,
                medianprops={"color": "black"},
            )
    spread.set_yscale("log")
    spread.set_xticks([3 * k + 0.5 for k in range(len(names))], [f"{name}\nbefore, after" for name in names])
    spread.set_title("perplexity of the responses\n(boxes: quartiles; lines: 5 to 95%)", fontsize=9)
    one, other = (table[f"{name} mean"] for name in names[:2])
    halves = (one > one.median()) == (other > other.median())
    agree.loglog(one[halves], other[halves], "o", ms=3, alpha=0.6, mew=0, color=MOST, label="in the same half")
    agree.loglog(one[~halves], other[~halves], "o", ms=3, alpha=0.8, mew=0, color=LEAST, label="in another")
    agree.set(xlabel=f"perplexity under {names[0]}, over the training", ylabel=f"under {names[1]}")
    agree.set_title(
        f"rank correlation {one.corr(other, 'spearman'):.2f},\n{halves.mean():.0%} in the same half", fontsize=9
    )
    agree.legend(frameon=False, fontsize=8)
    if hidden is not None:
        hidden_map(places, hidden)
    save(figure, path)


def hidden_map(panel: Axes, run: Path) -> None:
    """Draw t-SNE of the last hidden states of a run's model for the rows of both ends, a quarter each."""
    from sftmix.tools.report.pictures import tsne
    from sftmix.tools.report.run import look, read_run

    view = read_run(run)
    end = len(view.by_confidence) // 4
    rows = np.concatenate([view.by_confidence[:end], view.by_confidence[-end:]])
    states = look(view, "train", rows, hidden=True)
    assert states is not None, f"{run} has no exported model"
    for part, colour, name in zip(np.split(tsne(states), 2), (LEAST, MOST), ("least", "most"), strict=True):
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
    confidence(IMAGES / "real-confidence.svg", options.hidden)


if __name__ == "__main__":
    main()
