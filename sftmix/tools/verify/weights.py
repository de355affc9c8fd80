"""Weights of a replay, compared with those of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file

from sftmix.tools.verify.certificate import Finding

MOVES = 2
"""Largest distance of two values that rounding may explain, in the largest moves of their tensor: one may have moved as
far to one side as the other to the other side. After one step of AdamW in bf16 it is 2.0 indeed."""

Tensors: TypeAlias = Mapping[str, torch.Tensor]


def check_weights(
    kind: str, expected: Tensors, found: Tensors, where: str, *, exact: bool, before: Tensors | None = None
) -> list[Finding]:
    """Compare tensors by name, bit for bit or within MOVES.

    expected  those of the run
    found     those of the replay
    exact     False: another machine than the run's made them, whose rounding AdamW may make as large as its steps
    before    the weights that the replay began with, by which the moves are known; None: not at hand
    """
    names = sorted({*expected, *found})
    shapes = [(name, _shape(expected.get(name)), _shape(found.get(name))) for name in names]
    others = [Finding(kind, False, f"{where}, {n}", False, then, now) for n, then, now in shapes if then != now]
    if others:
        return others
    different = [name for name in names if not torch.equal(expected[name], found[name])]
    if not different:
        return [Finding(kind, True, f"{where}, {len(names)} tensors, bit for bit")]
    if exact:
        return [_differing(kind, f"{where}, {name}", expected[name], found[name]) for name in different]
    largest = max(float(_apart(expected[name], found[name]).max()) for name in different)
    if before is None:
        why = "ranks that share the weights do not keep those before the first step"
        return [Finding(kind, None, f"{where}: {why}; values are at most {largest:.1e} apart", False)]
    far = [name for name in different if not _near(expected[name], found[name], before[name])]
    if far:
        told = f"farther than {MOVES} times what its tensor moved"
        return [_differing(kind, f"{where}, {told}: {name}", expected[name], found[name]) for name in far]
    told = f"values at most {largest:.1e} apart, within {MOVES} times what their tensor moved"
    return [Finding(kind, True, f"{where}, {len(names)} tensors, {told}", False)]


def _near(expected: torch.Tensor, found: torch.Tensor, before: torch.Tensor) -> bool:
    """Return True if no value is farther away than MOVES, and the last digit of its dtype.

    The moves are those of the replay: a forged value would be among those of the run.
    """
    apart, moved = _apart(expected, found), float(_apart(before, found).max())
    digit = torch.finfo(found.dtype).eps * found.double().abs() if found.is_floating_point() else 0.0
    return bool((apart.isfinite() & (apart <= MOVES * moved + digit)).all())


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
