"""Draw docs/images/results/regularises.svg, and print what it shows: contrasts at each seed, some of them not planned.

It needs matplotlib: `.[bench]`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.packed import whole  # noqa: E402
from benchmarks.evidence.real.pictures import BLUE, BROWN, GREY, IMAGES, WIDTH, draw_seeds, save  # noqa: E402
from benchmarks.evidence.regularises.analyse import (  # noqa: E402
    COMPARED,
    ENDPOINTS,
    HEAD,
    MIXED,
    PRIMARY,
    RANDOM,
    SPLIT,
    Contrast,
    Runs,
    Weights,
    difference,
    line,
)
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.tools.compare.statistics import interval  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402

GREEN = "#2f855a"
SHOWN = {"last": (BLUE, -0.22), "tempered": (GREEN, 0.0), "best": (BROWN, 0.22)}
WORDS = {"last": "last step", "tempered": "after a temperature", "best": "best epoch"}
EFFECTS = {
    "SFTMix − NTP": MIXED,
    "random halves − NTP": RANDOM,
    "E3: literal sum − NTP": PRIMARY[2].weights,
    "soft labels − NTP": difference("SoftLabels", "NTP"),
    "label smoothing − NTP": difference("LabelSmoothing", "NTP"),
}
REST = {
    "E1: (SFTMix − NTP) −\n(random halves − NTP)": SPLIT,
    "E2: SFTMix −\nlabel smoothing": PRIMARY[1].weights,
    "SFTMix −\nsoft labels": COMPARED["SFTMix − soft labels"],
    "SFTMix −\nrandom halves": difference("SFTMix", "SFTMix-random"),
    "NTP − NTP in the order\nof random halves": difference("NTP", "NTP-random"),
}


def lines(panel: Axes, runs: Runs, contrasts: Mapping[str, Weights]) -> None:
    """Draw three lines for each contrast: its seeds as points, mean and 95% interval over the seeds."""
    panel.axvline(0, color=GREY, lw=0.8)
    for place, weights in enumerate(contrasts.values()):
        for end, (colour, off) in SHOWN.items():
            values = runs.values(Contrast("", weights, ENDPOINTS[end]))
            draw_seeds(panel, values, interval(values), place + off, colour, WORDS[end] if place == 0 else None)
    panel.set_yticks(range(len(contrasts)), list(contrasts))
    panel.set_ylim(len(contrasts) - 0.5, -0.5)


def main() -> None:
    runs = Runs(whole(RESULTS / "regularises"))
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 7.2))
    lines(upper, runs, EFFECTS)
    lines(lower, runs, REST)
    drawn = [
        Contrast(f"{name}, {end}".replace("\n", " "), weights, ENDPOINTS[end])
        for name, weights in {**EFFECTS, **REST}.items()
        for end in SHOWN
    ]
    print(markdown_table([HEAD, *(line(runs, each) for each in drawn)]))
    figure.legend(*upper.get_legend_handles_labels(), loc="upper center", ncols=3, columnspacing=1, handletextpad=0.1)
    figure.supxlabel("difference in held-out NLL, nats per token\nbelow 0: the first is better", fontsize=10)
    save(figure, IMAGES / "regularises.svg", top=0.96)


if __name__ == "__main__":
    main()
