"""Draw docs/images/results/softlabels.svg: contrasts at three endpoints, and the arms' ends beside their fit.

analyse.py prints all of its figures. It needs matplotlib: `.[bench]`.
"""

import sys
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.real.pictures import IMAGES, WIDTH, save  # noqa: E402
from benchmarks.evidence.regularises.analyse import LAST, Contrast, difference  # noqa: E402
from benchmarks.evidence.regularises.picture import lines  # noqa: E402
from benchmarks.evidence.softlabels.analyse import Kept  # noqa: E402
from benchmarks.evidence.softlabels.contrasts import ENDPOINTS, IN_FLOAT32, PRIMARY  # noqa: E402
from benchmarks.evidence.softlabels.run import FIRST  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402

EFFECTS = {f"{arm} − NTP": difference(arm, "NTP") for arm in IN_FLOAT32 if arm != "NTP"}
TESTED = {
    each.name.replace(" − ", " −\n").replace(", ", " (") + ")": each.weights for each in PRIMARY if each != PRIMARY[3]
}
"""P1 to P5 without P4, which is in EFFECTS; in brackets the endpoint that is tested."""
SECONDARY = {"SoftElsewhere −\nSoftLabels": difference("SoftElsewhere", "SoftLabels")}


def fits(panel: Axes, runs: Kept) -> None:
    """Draw each run at its NLL of the training rows and of the held-out ones, last step, and the means of each arm."""
    for place, arm in enumerate(IN_FLOAT32):
        colour = f"C{place}"
        fit, last = (runs.values(Contrast("", {arm: 1.0}, end)) for end in (ENDPOINTS["fit"], LAST))
        panel.plot(fit, last, "o", ms=3, alpha=0.4, mew=0, color=colour)
        panel.plot(fit.mean(), last.mean(), "D", ms=5, color=colour, label=arm)
    panel.set(xlabel="NLL of the training rows, last step", ylabel="held-out NLL, last step")
    panel.legend(fontsize=8, handletextpad=0.1, loc="upper right")


def main() -> None:
    runs, first = Kept(RESULTS), Kept(RESULTS, FIRST)
    figure, (upper, middle, lower) = plt.subplots(3, 1, figsize=(WIDTH, 10.8))
    lines(upper, runs, EFFECTS)
    lines(middle, runs, {**TESTED, **SECONDARY})
    for panel in (upper, middle):
        panel.locator_params(axis="x", nbins=4)
    middle.set_xlabel("difference, nats per held-out token\nbelow 0: the first is better")
    fits(lower, first)
    figure.legend(*upper.get_legend_handles_labels(), loc="upper center", ncols=3, columnspacing=1, handletextpad=0.1)
    save(figure, IMAGES / "softlabels.svg", top=0.97)


if __name__ == "__main__":
    main()
