"""The strength at which an arm has the temperature of another arm, found by bisection in a table of pilot seeds.

    wanted, tried = matched("runs/pilot", mixed, smoothed, 0.2, [901, 902])

returns the temperature of the configuration `mixed`, and the temperature at each strength that `smoothed` made a
configuration of. A repeated call only reads finished runs.
"""

from collections.abc import Callable

from sftmix import RunConfig
from sftmix.tools.compare import Comparison, TableOptions, compare

FIGURE = "calibration.temperature"


def matched(
    out: str,
    like: RunConfig,
    arm: Callable[[float], RunConfig],
    strongest: float,
    seeds: list[int],
    within: float = 0.01,
    tries: int = 6,
) -> tuple[float, dict[float, float]]:
    """Return the temperature of `like`, and strength -> temperature of all that was tried, the chosen strength last.

    Temperatures are means over the seeds. Half of the range is left out after each try, until one is within.

    like       RunConfig whose temperature is wanted
    arm        strength -> RunConfig; a stronger one has a lower temperature
    strongest  the first strength that is tried; the range is from 0 to it
    Raises ValueError if no tried strength is within.
    """
    variants, tried = {"like": like}, {}
    weak, strong, strength = 0.0, strongest, strongest
    while len(tried) < tries:
        variants[f"strength-{strength:g}"] = arm(strength)
        table = compare(Comparison(out=out, variants=variants, options=TableOptions(seeds=seeds, metric=FIGURE)))
        wanted, *_, tried[strength] = (found["metrics"][FIGURE]["mean"] for found in table["variants"].values())
        if abs(tried[strength] - wanted) <= within:
            return wanted, tried
        if tried[strength] > wanted:
            weak = strength
        else:
            strong = strength
        if weak == strong:
            raise ValueError(f"the strongest, {strongest:g}, ends at {tried[strength]:.4f}, not at {wanted:.4f}")
        strength = (weak + strong) / 2
    raise ValueError(f"no strength has a temperature within {within} of {wanted:.4f}: {tried}")
