"""Losses and weights of a replay, compared with those of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sftmix.verify.certificate import Finding, listed
from sftmix.verify.window import Window

RELATIVE = 1e-5
"""Largest relative difference of a loss, where another machine than the run's rounds differently."""
COUNTS = ("epoch", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Whole numbers of a step, which follow from its examples."""
CLOCKS = ("step", "time", "tokens_per_second", "mixing_seconds")
"""Entries of a step that are no result of it."""


@dataclass(frozen=True)
class Comparison:
    """A rule for equal numbers.

    exact  True: bit for bit, as on the machine of the run; False: within RELATIVE
    """

    exact: bool

    def same(self, expected: Any, found: Any) -> bool:
        if expected == found or self.exact or not isinstance(expected, float) or not isinstance(found, float):
            return bool(expected == found)
        return math.isclose(expected, found, rel_tol=RELATIVE)


def check_steps(window: Window, replayed: Mapping[int, Mapping[str, Any]], rule: Comparison) -> list[Finding]:
    """Compare the lines of metrics.jsonl: first the counts, which tell of the examples, then all other numbers."""
    counts, losses, names, exact = [], [], set[str](), True
    for step in range(window.start + 1, window.end + 1):
        then, now = window.logged.get(step), replayed.get(step)
        if then is None or now is None:
            where = f"step {step}"
            what = "a line in metrics.jsonl"
            losses.append(Finding("losses", False, where, False, what if then is None else "a step", "none"))
            continue
        for name in (name for name in now if name in then and name not in CLOCKS):
            kind, found = ("examples", counts) if name in COUNTS else ("losses", losses)
            if not rule.same(then[name], now[name]):
                found.append(Finding(kind, False, f"step {step}, {name}", False, then[name], now[name]))
            names.add(name)
            exact &= then[name] == now[name]
    told = [name for name in COUNTS if name in names]
    if not counts:
        note = f"{listed(told)} of each step (ids are not logged)"
        counts = [Finding("examples", True, note)]
    if not losses:
        rest = sorted(names - set(told))
        losses = [Finding("losses", True, f"{listed(rest)} of {window.end - window.start} steps{_how(exact)}", exact)]
    return [*counts, *losses]


def check_weights(
    kind: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: str, rule: Comparison
) -> list[Finding]:
    """Compare tensors by name.

    expected  those of the run
    found     those of the replay
    """
    findings = [
        Finding(kind, False, f"{where}, {name}", False, _shape(expected.get(name)), _shape(found.get(name)))
        for name in sorted({*expected, *found})
        if _shape(expected.get(name)) != _shape(found.get(name))
    ]
    exact = True
    for name in sorted({*expected, *found} if not findings else ()):
        then, now = expected[name], found[name]
        if torch.equal(then, now):
            continue
        exact = False
        if rule.exact or not _near(then, now):
            findings.append(_differing(kind, f"{where}, {name}", then, now))
    if findings:
        return findings
    largest = max((float((expected[name].double() - found[name].double()).abs().max()) for name in expected), default=0)
    how = _how(exact) if exact else f", at most {largest:.1e} apart"
    return [Finding(kind, True, f"{where}: {len(expected)} tensors{how}", exact)]


def _differing(kind: str, where: str, then: torch.Tensor, now: torch.Tensor) -> Finding:
    """Return the finding about a tensor, with the values that are farthest apart."""
    apart = (then.double() - now.double()).abs().flatten()
    apart = torch.where(apart.isnan(), torch.inf, apart)
    at, count = int(apart.argmax()), int((then != now).sum())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), then.shape)]
    told = f"{where}{place}, {count} of {then.numel()} values, at most {float(apart[at]):.3g} apart"
    return Finding(kind, False, told, False, float(then.flatten()[at]), float(now.flatten()[at]))


def _near(then: torch.Tensor, now: torch.Tensor) -> bool:
    scale = float(then.double().abs().max()) if then.numel() else 0.0
    rounding = torch.finfo(then.dtype).eps if then.dtype in (torch.bfloat16, torch.float16) else 0.0
    return bool(torch.allclose(then.double(), now.double(), rtol=rounding, atol=RELATIVE * scale))


def _shape(tensor: torch.Tensor | None) -> str:
    return "no tensor" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _how(exact: bool) -> str:
    return ", bit for bit" if exact else f", within {RELATIVE:g}"


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found
