"""One comparison for logs, tables, weights and figures, and the rules of what counts as the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sftmix.tools.verify.certificate import Finding

RELATIVE = {"fp32": 1e-5, "bf16": 1e-2}
"""Precision -> largest relative difference of a loss, where another machine than the run's rounds differently."""
OF_GRADIENT = 10
"""Multiple of RELATIVE for the norm of the gradient, in which the rounding of earlier steps grows fastest."""
OF_CONFIDENCE = 1e-9
"""Largest relative difference of a confidence: another processor may round an exponential in another way."""
EXAMPLES = ("epoch", "rows", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Entries of a step that follow from its examples alone: the hash of its rows, and counts."""
LOSSES = ("loss", "ntp", "mixup", "mu_effective", "learning_rate", "grad_norm")
"""The other entries that the loop writes of every step; more of them come from callbacks."""
CLOCKS = ("step", "time", "tokens_per_second", "mixing_seconds")
"""Entries of a step that are no result of it."""

Bound = Callable[[str, np.ndarray], Any]
"""Name, values -> the largest distance at which values count as the same."""


def exactly(name: str, values: np.ndarray) -> float:
    return 0.0


def compare(
    kind: str,
    where: str,
    expected: Mapping[str, Any],
    replayed: Mapping[str, Any],
    *,
    within: Bound = exactly,
    labels: Sequence[str] = (),
) -> list[Finding]:
    """Compare values by name: tensors, columns of a table or a log, or single values of any kind.

    labels  of the values of each column, for the note on the one that is farthest off
    """
    findings, largest = list[Finding](), 0.0
    for name in dict.fromkeys([*expected, *replayed]):
        then, now = _array(expected.get(name)), _array(replayed.get(name))
        if (then.shape, then.dtype) != (now.shape, now.dtype):
            shapes = [f"{values.dtype} {list(values.shape)}" for values in (then, now)]
            findings.append(Finding(kind, False, f"{where}, {name}", False, *shapes))
            continue
        same = (then == now) | ((then != then) & (now != now))  # NaN is NaN
        if same.all():
            continue
        apart, wrong = (~same).astype(float), ~same
        if then.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                apart = np.where(same, 0.0, np.abs(then - now))
                wrong &= ~(np.isfinite(apart) & (apart <= within(name, now)))
            apart = np.where(np.isnan(apart), np.inf, apart)
        largest = max(largest, float(apart.max()))
        if wrong.any():
            place = np.unravel_index(int(np.where(wrong, apart, -1.0).argmax()), apart.shape)
            label = labels[int(place[0])] if labels else str([int(i) for i in place]) if apart.size > 1 else ""
            count = f"{wrong.sum()} of {wrong.size} values differ"
            note = f"{where}, {name}{f', {label}' if label else ''}; {count}"
            findings.append(Finding(kind, False, note, False, *(_plain(values[place]) for values in (then, now))))
    names = ", ".join(expected) if len(expected) <= 20 else f"{len(expected)} tensors"
    how = f"values at most {largest:.1e} apart" if largest else "bit for bit"
    return findings or [Finding(kind, True, f"{where}, {names}, {how}", not largest)]


def _array(values: Any) -> np.ndarray:
    """Return numbers as float64, other lists as objects, and anything else as a single object."""
    if isinstance(values, torch.Tensor):
        return values.detach().double().numpy()
    if isinstance(values, np.ndarray):
        return values
    if not isinstance(values, list):
        values = [values]
    if all(isinstance(value, int | float | None) for value in values):
        return np.array(values, dtype=float)
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        array[place] = value
    return array


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str | int | float | None) and value == value else str(value)


def rounded(precision: str) -> Bound:
    """Return the bound of the entries of metrics.jsonl on another machine; `precision` is fp32 or bf16."""

    def within(name: str, values: np.ndarray) -> Any:
        if name in EXAMPLES:
            return 0.0
        relative = RELATIVE["fp32" if name == "learning_rate" else precision]  # the rate is computed in float64
        return relative * (OF_GRADIENT if name == "grad_norm" else 1) * np.abs(values)

    return within


def of_confidence(name: str, values: np.ndarray) -> Any:
    return OF_CONFIDENCE * np.abs(values)


def compare_logs(
    run: Mapping[int, Mapping[str, Any]],
    replay: Mapping[int, Mapping[str, Any]],
    steps: Sequence[int],
    *,
    within: Bound = exactly,
) -> list[Finding]:
    """Compare the lines of metrics.jsonl of these steps: what tells of the examples, then all other numbers.

    Entries of callbacks are compared only bit for bit, and only where run and replay have them in the same steps.
    """
    findings = []
    both = [step for step in steps if step in run and step in replay]
    for step in steps:
        if step not in both:
            lines = ["a line" if step in lines else "none" for lines in (run, replay)]
            findings.append(Finding("losses", False, f"metrics.jsonl, step {step}", False, *lines))
    columns: dict[str, tuple[dict[str, list[Any]], dict[str, list[Any]]]] = {"examples": ({}, {}), "losses": ({}, {})}
    for name in dict.fromkeys(name for step in both for name in (*replay[step], *run[step]) if name not in CLOCKS):
        lacking = any((name in run[step]) != (name in replay[step]) for step in both)
        if name not in (*EXAMPLES, *LOSSES) and (lacking or within is not exactly):
            findings.append(Finding("losses", None, f"{name}: it is of a callback, and of other steps or machines"))
            continue
        for column, log in zip(columns["examples" if name in EXAMPLES else "losses"], (run, replay), strict=True):
            column[name] = [log[step].get(name) for step in both]
    for kind, (expected, replayed) in columns.items():
        if expected:
            labels = [f"step {step}" for step in both]
            findings += compare(kind, "metrics.jsonl", expected, replayed, within=within, labels=labels)
    return findings


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
