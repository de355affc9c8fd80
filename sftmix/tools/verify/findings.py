"""What was compared and found: one comparison for logs, tables, weights and figures, and the certificate of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sftmix.tools.verify.window import Window

KINDS = ("files", "inputs", "split", "examples", "losses", "weights", "model", "figures")
"""What is compared, in the order of the lines."""
_SHOWN = 8
"""Differences of one kind that are printed; JSON has all."""
RELATIVE = {"fp32": 1e-5, "bf16": 1e-2}
"""Precision -> largest relative difference of a loss, where another machine than the run's rounds differently."""
OF_CONFIDENCE = dict.fromkeys(("confidence", "variability"), 1e-9)
"""The same for these columns, by any precision: another processor may round an exponential in another way."""
EXAMPLES = ("epoch", "rows", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Entries of a step that follow from its examples alone: the hash of its rows, and counts."""
LOSSES = ("loss", "ntp", "mixup", "mu_effective", "learning_rate", "grad_norm")
"""The other entries that the loop writes of every step; more of them come from callbacks."""
CLOCKS = ("step", "time", "tokens_per_second", "mixing_seconds")
"""Entries of a step that are no result of it."""


@dataclass(frozen=True)
class Finding:
    """One comparison.

    kind      one of KINDS
    same      None: not compared, and `note` says why
    note      what was compared, or what differs
    exact     False: equal but for rounding
    expected  what the run recorded, where it differs
    found     what is there, or what the replay gave
    """

    kind: str
    same: bool | None
    note: str
    exact: bool = True
    expected: Any = None
    found: Any = None

    def line(self) -> str:
        if self.same is None:
            return f"{self.kind:<9} not compared: {self.note}"
        if self.same:
            return f"{self.kind:<9} same: {self.note}"
        return f"{self.kind:<9} differs: {self.note}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Certificate:
    """All findings about some steps of a run.

    recorded  the machines that made the steps of the window, as `sftmix.training.machine.machine_of` gives them
    machine   the one of the replay; empty if nothing was replayed
    """

    window: Window
    findings: Sequence[Finding]
    recorded: Sequence[Mapping[str, Any]] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """True if nothing differs."""
        return all(finding.same is not False for finding in self.findings)

    def other_machine(self) -> list[str]:
        """List what differs between the machines of the run and that of the replay."""
        lines = []
        for name, here in self.machine.items():
            others = dict.fromkeys(one.get(name, "not recorded") for one in self.recorded)
            lines += [f"{name} is {other} in the run and {here} here" for other in others if other != here]
        return lines

    def lines(self) -> list[str]:
        """Return a line for each finding, of a kind with many the first ones, and the sentence."""
        lines = []
        for kind in KINDS:
            of_kind = [finding.line() for finding in self.findings if finding.kind == kind]
            lines += of_kind[:_SHOWN]
            if len(of_kind) > _SHOWN:
                lines.append(f"{kind:<9} ... and {len(of_kind) - _SHOWN} more")
        return [*lines, self.sentence()]

    def sentence(self) -> str:
        """Say in one sentence what the certificate is worth."""
        window = self.window
        if not self.same:
            different = _kinds(finding for finding in self.findings if finding.same is False)
            return f"{window.run} is not what its configuration says: differences in {different}"
        replayed = [one for one in self.findings if one.kind in ("examples", "losses", "weights") and one.same]
        how = "bit for bit"
        if not all(finding.exact for finding in replayed):
            why = ", ".join(self.other_machine()) or "by an unknown machine, or by a GPU, which adds in any order"
            how = f"but for rounding ({why})"
        left = _kinds(finding for finding in self.findings if finding.same is None)
        but = f"; not compared, at least in part: {left}" if left else ""
        steps = f"steps {window.start + 1} to {window.end} of {window.stage}"
        return f"{steps} replayed: {_kinds(replayed)} are the same, {how}{but}"

    def plain(self) -> dict[str, Any]:
        """Return the certificate as values of JSON; exact: all was compared, and is the same bit for bit."""
        return {
            "run": str(self.window.run),
            "stage": self.window.stage,
            "from": self.window.start,
            "to": self.window.end,
            "same": self.same,
            "exact": all(finding.same and finding.exact for finding in self.findings),
            "machine": {"run": list(self.recorded), "replay": self.machine, "different": self.other_machine()},
            "findings": [asdict(finding) for finding in self.findings],
            "sentence": self.sentence(),
        }


def _kinds(findings: Iterable[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.kind for finding in findings))


# ---------------------------------------------------------------------------------------------- comparing


def compare(
    kind: str,
    where: str,
    expected: Mapping[str, Any],
    replayed: Mapping[str, Any],
    *,
    relative: Mapping[str, float] | None = None,
    labels: Sequence[str] = (),
) -> list[Finding]:
    """Compare values by name: tensors, columns of a table or a log, or single values of any kind.

    relative  name -> largest relative difference at which its values count as the same; 0 for all others
    labels    of the values of each column, for the note on the first that differs
    """
    findings, exact = list[Finding](), True
    for name in dict.fromkeys([*expected, *replayed]):
        then, now = _array(expected.get(name)), _array(replayed.get(name))
        if (then.shape, then.dtype) != (now.shape, now.dtype):
            shapes = [f"{values.dtype} {list(values.shape)}" for values in (then, now)]
            findings.append(Finding(kind, False, f"{where}, {name}", False, *shapes))
            continue
        same = (then == now) | ((then != then) & (now != now))  # NaN is NaN
        exact &= bool(same.all())
        if bound := (relative or {}).get(name):
            with np.errstate(invalid="ignore"):
                same |= np.abs(then - now) <= bound * np.abs(now)
        if not same.all():
            place = np.unravel_index(int(same.argmin()), same.shape)
            label = labels[int(place[0])] if labels else str([int(i) for i in place]) if same.size > 1 else ""
            count = f"{(~same).sum()} of {same.size} values differ"
            note = f"{where}, {name}{f', {label}' if label else ''}; {count}"
            findings.append(Finding(kind, False, note, False, *(_plain(values[place]) for values in (then, now))))
    names = ", ".join(expected) if len(expected) <= 20 else f"{len(expected)} tensors"
    how = "bit for bit" if exact else "but for rounding"
    return findings or [Finding(kind, True, f"{where}, {names}, {how}", exact)]


def _array(values: Any) -> np.ndarray:
    """Return numbers as float64, other lists as objects, and anything else as a single object."""
    if isinstance(values, torch.Tensor):
        return values.detach().double().numpy()
    if not isinstance(values, list):
        values = [values]
    if all(isinstance(value, int | float | None) for value in values):
        return np.array(values, dtype=float)
    return np.fromiter(values, dtype=object)


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str | int | float | None) and value == value else str(value)


def rounded(precision: str) -> dict[str, float]:
    """Return what may differ in metrics.jsonl on another machine; `precision` is fp32 or bf16.

    The rate is computed in float64; in the norm of the gradient the rounding of earlier steps grows fastest.
    """
    bound = RELATIVE[precision]
    return dict.fromkeys(LOSSES, bound) | {"learning_rate": RELATIVE["fp32"], "grad_norm": 10 * bound}


def compare_logs(
    run: Mapping[int, Mapping[str, Any]],
    replay: Mapping[int, Mapping[str, Any]],
    steps: Sequence[int],
    *,
    relative: Mapping[str, float] | None = None,
) -> list[Finding]:
    """Compare the lines of metrics.jsonl of these steps: what tells of the examples, then all other numbers.

    Entries of callbacks are compared only bit for bit, and only where run and replay have them in the same steps.

    relative  of `rounded`; None: bit for bit
    """
    lines = [(run.get(step, {}), replay.get(step, {})) for step in steps]
    names = dict.fromkeys(name for then, now in lines for name in (*now, *then) if name not in CLOCKS)
    lacking = {name for name in names for then, now in lines if (name in then) != (name in now)}
    left = [name for name in names if name not in (*EXAMPLES, *LOSSES) and (name in lacking or relative)]
    findings = [
        Finding("losses", None, f"{name}: it is of a callback, and of other steps or machines") for name in left
    ]
    labels = [f"step {step}" for step in steps]
    for kind in ("examples", "losses"):
        columns = [name for name in names if name not in left and (name in EXAMPLES) == (kind == "examples")]
        values = [{name: [line[side].get(name) for line in lines] for name in columns} for side in (0, 1)]
        findings += compare(kind, "metrics.jsonl", *values, relative=relative, labels=labels)
    return findings


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory."""
    return dict(pair for file in sorted(directory.glob("*.safetensors")) for pair in load_file(file).items())
