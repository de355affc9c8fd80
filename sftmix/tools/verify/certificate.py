"""What was compared, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sftmix.tools.verify.window import Window

KINDS = ("files", "inputs", "split", "examples", "losses", "weights", "model", "figures")
"""What is compared, in the order of the lines."""
REPLAYED = ("examples", "losses", "weights")
"""What the last sentence tells of."""
_SHOWN = 8
"""Differences of one kind that are printed; JSON has all."""


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
    def different(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.same is False]

    @property
    def same(self) -> bool:
        """True if nothing differs."""
        return not self.different

    @property
    def exact(self) -> bool:
        """True if all was compared, and is the same bit for bit."""
        return all(finding.same and finding.exact for finding in self.findings)

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
            kinds = dict.fromkeys(finding.kind for finding in self.different)
            return f"{window.run} is not what its configuration says: differences in {', '.join(kinds)}"
        replayed = [finding for finding in self.findings if finding.kind in REPLAYED and finding.same]
        kinds = dict.fromkeys(finding.kind for finding in replayed)
        how = "bit for bit"
        if not all(finding.exact for finding in replayed):
            why = ", ".join(self.other_machine()) or "by an unknown machine, or by a GPU, which adds in any order"
            how = f"but for rounding ({why})"
        left = dict.fromkeys(finding.kind for finding in self.findings if finding.same is None)
        but = f"; not compared, at least in part: {', '.join(left)}" if left else ""
        steps = f"steps {window.start + 1} to {window.end} of {window.stage}"
        return f"{steps} replayed: {', '.join(kinds)} are the same, {how}{but}"

    def plain(self) -> dict[str, Any]:
        """Return the certificate as values of JSON."""
        return {
            "run": str(self.window.run),
            "stage": self.window.stage,
            "from": self.window.start,
            "to": self.window.end,
            "same": self.same,
            "exact": self.exact,
            "machine": {"run": list(self.recorded), "replay": self.machine, "different": self.other_machine()},
            "findings": [asdict(finding) for finding in self.findings],
            "sentence": self.sentence(),
        }
