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
    blocks    True: it differs, and the replay needs it
    """

    kind: str
    same: bool | None
    note: str
    exact: bool = True
    expected: Any = None
    found: Any = None
    blocks: bool = False

    def line(self) -> str:
        if self.same is None:
            return f"{self.kind:<9} not compared: {self.note}"
        if self.same:
            return f"{self.kind:<9} same: {self.note}"
        values = "" if self.expected is self.found is None else f": expected {self.expected}, found {self.found}"
        return f"{self.kind:<9} differs: {self.note}{values}"


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
        return not self.different

    @property
    def different(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.same is False]

    @property
    def exact(self) -> bool:
        """True if all was compared, and is the same bit for bit."""
        return all(finding.same and finding.exact for finding in self.findings)

    def other_machine(self) -> list[str]:
        """List what differs between the machines of the run and that of the replay."""
        told = []
        for name, here in self.machine.items():
            others = [one.get(name, "not recorded") for one in self.recorded]
            told += [
                f"{name} is {other} in the run and {here} here" for other in dict.fromkeys(others) if other != here
            ]
        return told

    def lines(self) -> list[str]:
        """Return a line for each finding, of a kind with many differences the first ones."""
        lines = []
        for kind in KINDS:
            told = [finding.line() for finding in self.findings if finding.kind == kind]
            more = [f"{kind:<9} ... and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
            lines += [*told[:_SHOWN], *more]
        return lines

    def sentence(self) -> str:
        """Say in one sentence what the certificate is worth."""
        window = self.window
        if not self.same:
            kinds = list(dict.fromkeys(finding.kind for finding in self.different))
            return f"{window.run} is not what its configuration says: differences in {listed(kinds)}"
        told = [f for f in self.findings if f.kind in REPLAYED and f.same]
        how = "bit for bit" if all(f.exact for f in told) else f"but for rounding ({self._why_rounded()})"
        kinds = [kind for kind in REPLAYED if any(f.kind == kind for f in told)]
        steps = f"steps {window.start + 1} to {window.end} of {window.stage}"
        left = list(dict.fromkeys(f.kind for f in self.findings if f.same is None))
        but = f"; not compared, at least in part: {listed(left)}" if left else ""
        return f"{steps} replayed: {listed(kinds)} are the same, {how}{but}"

    def _why_rounded(self) -> str:
        if not self.recorded:
            return "the run does not say on which machine these steps were made"
        return listed(self.other_machine()) or "a GPU may add in another order each time"

    def plain(self) -> dict[str, Any]:
        """Return the certificate as values of JSON."""
        window = self.window
        return {
            "run": str(window.run),
            "stage": window.stage,
            "from": window.start,
            "to": window.end,
            "same": self.same,
            "exact": self.exact,
            "machine": {"run": list(self.recorded), "replay": self.machine, "different": self.other_machine()},
            "findings": [asdict(finding) for finding in self.findings],
            "sentence": self.sentence(),
        }


def listed(names: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
