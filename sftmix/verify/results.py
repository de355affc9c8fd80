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
EXAMPLES = ("epoch", "rows", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Entries of a step that follow from its examples alone: the hash of its rows, and counts."""
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
    """Compare the lines of metrics.jsonl: first what tells of the examples, then all other numbers."""
    counts: list[Finding] = []
    losses: list[Finding] = []
    names, exact = set[str](), True
    for step in range(window.start + 1, window.end + 1):
        then, now = window.logged.get(step), replayed.get(step)
        if then is None or now is None:
            where = f"step {step}"
            what = "a line in metrics.jsonl"
            losses.append(Finding("losses", False, where, False, what if then is None else "a step", "none"))
            continue
        for name in (name for name in now if name in then and name not in CLOCKS):
            kind, found = ("examples", counts) if name in EXAMPLES else ("losses", losses)
            if not rule.same(then[name], now[name]):
                found.append(Finding(kind, False, f"step {step}, {name}", False, then[name], now[name]))
            names.add(name)
            exact &= then[name] == now[name]
    told = [name for name in EXAMPLES if name in names]
    if not counts:
        counts = [Finding("examples", True, f"{listed(told)} of each step")]
    if not losses:
        rest, how = sorted(names - set(told)), "bit for bit" if exact else f"within {RELATIVE:g}"
        losses = [Finding("losses", True, f"{listed(rest)} of {window.end - window.start} steps, {how}", exact)]
    return [*counts, *losses]


def check_weights(
    kind: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: str, rule: Comparison
) -> list[Finding]:
    """Compare tensors by name, bit for bit.

    By another rule, differences are told and not judged: AdamW may make a rounding as large as its learning rate.

    expected  those of the run
    found     those of the replay
    """
    names = sorted({*expected, *found})
    shapes = [(name, _shape(expected.get(name)), _shape(found.get(name))) for name in names]
    others = [Finding(kind, False, f"{where}, {n}", False, then, now) for n, then, now in shapes if then != now]
    if others:
        return others
    different = [name for name in names if not torch.equal(expected[name], found[name])]
    if not different:
        return [Finding(kind, True, f"{where}, {len(names)} tensors, bit for bit")]
    if rule.exact:
        return [_differing(kind, f"{where}, {name}", expected[name], found[name]) for name in different]
    largest = max(float(_apart(expected[name], found[name]).max()) for name in different)
    why = "this machine, or the layout of the configuration, rounds in another way than the run"
    return [Finding(kind, None, f"{where}: {why}; the values are at most {largest:.1e} apart", False)]


def _differing(kind: str, where: str, then: torch.Tensor, now: torch.Tensor) -> Finding:
    """Return the finding about a tensor, with the values that are farthest apart."""
    apart = _apart(then, now).flatten()
    at, count = int(apart.argmax()), int((then != now).sum())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), then.shape)]
    told = f"{where}{place}; {count} of {then.numel()} values differ, by at most {float(apart[at]):.3g}"
    return Finding(kind, False, told, False, float(then.flatten()[at]), float(now.flatten()[at]))


def _apart(then: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Return the distances of all values, infinite where one is NaN."""
    apart = (then.double() - now.double()).abs()
    return torch.where(apart.isnan(), torch.inf, apart)


def _shape(tensor: torch.Tensor | None) -> str:
    return "no tensor" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found
