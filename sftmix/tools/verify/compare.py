"""One comparison for logs, tables, weights and figures, and the rules of what counts as the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
MOVES = 2
"""Largest distance of two weights that rounding may explain, in the largest moves of their tensor: one may have moved
as far to one side as the other to the other side. After one step of AdamW in bf16 it is 2.0 indeed."""
EXAMPLES = ("epoch", "rows", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Entries of a step that follow from its examples alone: the hash of its rows, and counts."""
LOSSES = ("loss", "ntp", "mixup", "mu_effective", "learning_rate", "grad_norm")
"""The other entries that the loop writes of every step; more of them come from callbacks."""
DISCRETE = ("eval_accuracy", "eval_exact_match")
"""Shares of tokens and rows, in which rounding may count one of them in or out: not judged on another machine."""
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


@dataclass(frozen=True)
class Rule:
    """What counts as the same.

    exact      True: bit for bit, as on the machine of the run; False: within what rounding explains
    precision  fp32 or bf16
    """

    exact: bool
    precision: str = "fp32"

    def of_log(self, name: str, values: np.ndarray) -> Any:
        """Return the bound of an entry of metrics.jsonl."""
        if self.exact or name in EXAMPLES:
            return 0.0
        relative = RELATIVE["fp32" if name == "learning_rate" else self.precision]  # the rate is computed in float64
        relative *= OF_GRADIENT if name == "grad_norm" else 1
        of_callback = name not in LOSSES  # which may be a cosine or a share, near 0 and exact by its distance from 1
        return relative * np.maximum(np.abs(values), 1.0 if of_callback else 0.0)

    def of_weights(self, replayed: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> Bound:
        """Return the bound of weights by what their tensor moved, and the last digit of its dtype.

        The moves are those of the replay: a forged value would be among those of the run.
        """

        def within(name: str, values: np.ndarray) -> Any:
            dtype = replayed[name].dtype
            if self.exact or not dtype.is_floating_point:
                return 0.0
            moved = np.abs(values - _array(before[name])).max()
            return MOVES * moved + torch.finfo(dtype).eps * np.abs(values)

        return within


def of_confidence(name: str, values: np.ndarray) -> Any:
    return OF_CONFIDENCE * np.abs(values)


def compare_logs(
    run: Mapping[int, Mapping[str, Any]], replay: Mapping[int, Mapping[str, Any]], steps: Sequence[int], rule: Rule
) -> list[Finding]:
    """Compare the lines of metrics.jsonl of these steps: what tells of the examples, then all other numbers.

    An entry that only the run or only the replay has is not compared, unless the loop writes it of every step.
    """
    findings = []
    both = [step for step in steps if step in run and step in replay]
    for step in steps:
        if step not in both:
            lines = ["a line" if step in lines else "none" for lines in (run, replay)]
            findings.append(Finding("losses", False, f"metrics.jsonl, step {step}", False, *lines))
    columns: dict[str, tuple[dict[str, list[Any]], dict[str, list[Any]]]] = {"examples": ({}, {}), "losses": ({}, {})}
    for name in dict.fromkeys(name for step in both for name in (*replay[step], *run[step]) if name not in CLOCKS):
        kind = "examples" if name in EXAMPLES else "losses"
        lacking = any((name in run[step]) != (name in replay[step]) for step in both)
        if name in DISCRETE and not rule.exact:
            findings.append(Finding(kind, None, f"{name}: rounding may turn a token"))
        elif lacking and name not in (*EXAMPLES, *LOSSES):
            findings.append(Finding(kind, None, f"{name}: some steps have it in the run alone, or in the replay alone"))
        else:
            for column, log in zip(columns[kind], (run, replay), strict=True):
                column[name] = [log[step].get(name) for step in both]
    for kind, (expected, replayed) in columns.items():
        if expected:
            labels = [f"step {step}" for step in both]
            findings += compare(kind, "metrics.jsonl", expected, replayed, within=rule.of_log, labels=labels)
    return findings


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
