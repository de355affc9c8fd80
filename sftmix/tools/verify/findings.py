"""What was compared and found: one comparison for files, logs, tables, weights and figures, and the certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from sftmix.tools.verify.window import Window

_VERDICTS = {None: "not compared", True: "same", False: "differs"}
_MOST = 8
"""Names of one comparison of which is told that they differ."""
RELATIVE = {None: 0.0, "fp32": 1e-5, "bf16": 1e-2}
"""Precision -> largest relative difference of a loss, where another machine rounds differently; None: the run's own."""
OF_CONFIDENCE = dict.fromkeys(("confidence", "variability"), 1e-9)
"""The same for these columns, by any precision: another processor may round an exponential in another way."""
EXAMPLES = ("epoch", "rows", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Entries of a step that follow from its examples alone: the hash of its rows, and counts."""
LOSSES = ("loss", "ntp", "mixup", "mu_effective", "learning_rate", "grad_norm")
"""The other entries that the loop writes of every step; more of them come from callbacks."""
CLOCKS = ["time", "tokens_per_second", "mixing_seconds"]
"""Entries of a step that are no result of it."""


class Finding(NamedTuple):
    """One comparison.

    kind      files, inputs, split, examples, losses, weights, model or figures
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


def certificate(
    window: Window, findings: Sequence[Finding], recorded: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all that was found about the steps of a window, as `--json` prints it.

    recorded  the machines that made the steps, as `sftmix.training.machine.machine_of` gives them
    machine   the one of the replay; empty if nothing was replayed
    In it `exact` tells that all was compared, and is the same bit for bit.
    """
    different = []
    for name, here in machine.items():
        others = dict.fromkeys(one.get(name) for one in recorded)
        different += [f"{name} is {other} in the run and {here} here" for other in others if other != here]
    replayed = [one for one in findings if one.same and one.kind in ("examples", "losses", "weights")]
    wrong, left = ([one for one in findings if one.same is verdict] for verdict in (False, None))
    if wrong:
        sentence = f"{window.run} is not what its configuration says: differences in {_kinds(wrong)}"
    else:
        why = ", ".join(different) or "by an unknown machine, or by a GPU, which adds in any order"
        how = "bit for bit" if all(one.exact for one in replayed) else f"but for rounding ({why})"
        but = f"; not compared, at least in part: {_kinds(left)}" if left else ""
        steps = f"steps {window.start + 1} to {window.end} of {window.stage}"
        sentence = f"{steps} replayed: {_kinds(replayed)} are the same, {how}{but}"
    return {
        "run": str(window.run),
        "stage": window.stage,
        "from": window.start,
        "to": window.end,
        "same": not wrong,
        "exact": all(one.same and one.exact for one in findings),
        "machine": {"run": recorded, "replay": machine, "different": different},
        "findings": [one._asdict() for one in findings],
        "sentence": sentence,
    }


def _kinds(findings: Sequence[Finding]) -> str:
    return ", ".join(dict.fromkeys(one.kind for one in findings))


def lines(certified: Mapping[str, Any]) -> list[str]:
    """Return a line for each finding of a certificate, and the sentence."""
    shown = []
    for one in certified["findings"]:
        both = (one["expected"], one["found"])
        values = f": expected {both[0]}, found {both[1]}" if one["same"] is False and both != (None, None) else ""
        shown.append(f"{one['kind']:<9} {_VERDICTS[one['same']]}: {one['note']}{values}")
    return [*shown, certified["sentence"]]


# ---------------------------------------------------------------------------------------------- comparing


def compare(
    kind: str,
    where: str,
    expected: Mapping[str, Any] | pd.DataFrame,
    replayed: Mapping[str, Any] | pd.DataFrame,
    relative: Mapping[str, float] = {},
) -> list[Finding]:
    """Compare values by name: tensors, columns of a table or a log, or single values of any kind.

    relative  name -> largest relative difference at which its values count as the same; 0 for all others
    """
    findings, exact, named = list[Finding](), True, list(expected)
    for name in dict.fromkeys([*expected, *replayed]):
        then, now = _series(expected.get(name)).align(_series(replayed.get(name)))
        same = (then == now) | (then.isna() & now.isna())
        exact &= bool(same.all())
        if bound := relative.get(name):
            was, is_now = (pd.to_numeric(values, errors="coerce") for values in (then, now))
            same |= (was - is_now).abs() <= bound * is_now.abs()
        if not same.all() and len(findings) < _MOST:
            first = same.idxmin()
            place = f"{where}, {name}, {first}" if same.size > 1 else f"{where}, {name}"
            note = f"{place}; {(~same).sum()} of {same.size} values differ"
            values = [values.astype(object)[first] for values in (then, now)]
            findings.append(Finding(kind, False, note, False, *(None if x != x else x for x in values)))
    names = ", ".join(named) if len(named) <= 20 else f"{len(named)} values"
    how = "bit for bit" if exact else "but for rounding"
    return findings or [Finding(kind, True, f"{where}, {names}, {how}", exact)]


def _series(values: Any) -> pd.Series:
    if isinstance(values, torch.Tensor):
        return pd.Series(values.detach().double().flatten().numpy())
    if values is None:
        return pd.Series(dtype=float)
    return values if isinstance(values, pd.Series) else pd.Series([values])


def compare_logs(
    run: Sequence[Mapping[str, Any]],
    replay: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
    precision: str | None,
) -> list[Finding]:
    """Compare the lines of metrics.jsonl of these steps: what tells of the examples, then all other numbers.

    Entries of callbacks are compared only bit for bit, and only where run and replay have them in the same steps. The
    learning rate is computed in float64; in the norm of the gradient the rounding of earlier steps grows fastest.

    precision  fp32 or bf16, of numbers that another machine rounded; None: bit for bit
    """
    bound = RELATIVE[precision]
    relative = dict.fromkeys(LOSSES, bound) | {"learning_rate": min(bound, RELATIVE["fp32"]), "grad_norm": 10 * bound}
    logs = [pd.DataFrame(log).set_index("step").reindex(steps).rename("step {}".format) for log in (run, replay)]
    logs = [log.dropna(axis=1, how="all") for log in logs]
    then, now = (log.drop(columns=CLOCKS, errors="ignore") for log in logs[0].align(logs[1], axis=1))
    of_callbacks = then.columns.difference([*EXAMPLES, *LOSSES])
    left = [name for name in of_callbacks if precision or not then[name].isna().equals(now[name].isna())]
    note = "it is of a callback, and of other steps or machines"
    findings = [Finding("losses", None, f"{name}: {note}") for name in left]
    for kind in ("examples", "losses"):
        names = [name for name in then if name not in left and (name in EXAMPLES) == (kind == "examples")]
        findings += compare(kind, "metrics.jsonl", then[names], now[names], relative)
    return findings
