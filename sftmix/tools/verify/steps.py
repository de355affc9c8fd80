"""The lines of metrics.jsonl of a replay, compared with those of the run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sftmix.tools.verify.certificate import Finding, listed
from sftmix.tools.verify.window import Window

RELATIVE = {"fp32": 1e-5, "bf16": 1e-2}
"""Precision -> largest relative difference of a loss, where another machine than the run's rounds differently."""
OF_GRADIENT = 10
"""Multiple of RELATIVE for the norm of the gradient, in which the rounding of earlier steps grows fastest."""
EXAMPLES = ("epoch", "rows", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Entries of a step that follow from its examples alone: the hash of its rows, and counts."""
LOSSES = ("loss", "ntp", "mixup", "mu_effective", "learning_rate", "grad_norm")
"""The other entries that the loop writes of every step; more of them come from callbacks."""
ALWAYS = {*EXAMPLES, *LOSSES}
"""Entries that no line lacks."""
DISCRETE = ("eval_accuracy", "eval_exact_match")
"""Shares of tokens and rows, in which rounding may count one of them in or out: not judged where it differs."""
CLOCKS = ("step", "time", "tokens_per_second", "mixing_seconds")
"""Entries of a step that are no result of it."""


@dataclass(frozen=True)
class Comparison:
    """A rule for equal numbers.

    exact      True: bit for bit, as on the machine of the run; False: within the RELATIVE of the precision
    precision  fp32 or bf16
    """

    exact: bool
    precision: str = "fp32"

    def same(self, name: str, expected: Any, found: Any) -> bool:
        """Compare two values of one entry."""
        if expected == found or self.exact or not isinstance(expected, float) or not isinstance(found, float):
            return bool(expected == found)
        within = self._within(name)
        of_callback = name not in LOSSES  # which may be a cosine or a share, near 0 and exact by its distance from 1
        return math.isclose(expected, found, rel_tol=within, abs_tol=within if of_callback else 0.0)

    def told(self) -> str:
        """Say by which rule numbers are the same."""
        within, gradient = RELATIVE[self.precision], self._within("grad_norm")
        return "bit for bit" if self.exact else f"within {within:g} (grad_norm {gradient:g})"

    def _within(self, name: str) -> float:
        if name == "learning_rate":  # computed in float64, whatever the precision
            return RELATIVE["fp32"]
        return RELATIVE[self.precision] * (OF_GRADIENT if name == "grad_norm" else 1)


def check_steps(window: Window, replayed: Mapping[int, Mapping[str, Any]], rule: Comparison) -> list[Finding]:
    """Compare the lines of metrics.jsonl: first what tells of the examples, then all other numbers.

    Entries that a line of the run lacks differ if they are among ALWAYS. Else they are told, as are those that the
    replay does not give, and DISCRETE ones that differ on another machine.
    """
    differ: list[Finding] = []
    same, lacking, foreign, turned = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    exact = True
    for step in range(window.start + 1, window.end + 1):
        then, now = window.logged.get(step), replayed.get(step)
        if then is None or now is None:
            what = "a line in metrics.jsonl" if then is None else "a step"
            differ.append(Finding("losses", False, f"step {step}", False, what, "none"))
            continue
        foreign.update(then.keys() - now.keys() - {*CLOCKS})
        lacking.update(now.keys() - then.keys() - {*CLOCKS} - ALWAYS)
        for name in (name for name in now if name not in CLOCKS and (name in then or name in ALWAYS)):
            if name in then and rule.same(name, then[name], now[name]):
                same[name] += 1
                exact &= then[name] == now[name]
            elif name in DISCRETE and not rule.exact:
                turned[name] += 1
            else:
                place = f"step {step}, {name}"
                differ.append(Finding(_kind(name), False, place, False, then.get(name, "no entry"), now[name]))
    notes = [
        *_told(lacking, "which the log of the run does not have"),
        *_told(foreign, "which the replay does not give"),
        *_told(turned, "which differ: rounding may turn a token"),
    ]
    examples, losses = ([f for f in differ if f.kind == kind] for kind in ("examples", "losses"))
    how = Comparison(exact, rule.precision).told()
    return [
        *(examples or _all_same("examples", same, window)),
        *(losses or _all_same("losses", same, window, f", {how}", exact=exact)),
        *notes,
    ]


def _all_same(kind: str, same: Counter[str], window: Window, how: str = "", *, exact: bool = True) -> list[Finding]:
    """Return that all that was compared of a kind is the same; nothing if nothing was."""
    steps = window.end - window.start
    told = [name if same[name] == steps else f"{name} (in {same[name]})" for name in same if _kind(name) == kind]
    return [Finding(kind, True, f"{listed(told)} of {steps} steps{how}", exact)] if told else []


def _told(names: Counter[str], why: str) -> list[Finding]:
    return [
        Finding(_kind(name), None, f"{name} in {count} of the steps, {why}") for name, count in sorted(names.items())
    ]


def _kind(name: str) -> str:
    return "examples" if name in EXAMPLES else "losses"
