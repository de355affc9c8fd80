"""Findings: comparisons of what a run wrote with what its replay made, all of them by `findings_of`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from sftmix.components.contracts import OF_CLOCKS, OF_EXAMPLES, OF_LOSSES

MOST = 8
"""Most differences that one comparison names."""
RELATIVE = {None: 0.0, "fp32": 1e-5, "bf16": 1e-2}
"""Precision -> largest allowed relative difference of a loss on another machine; None: on the machine of the run."""
ROUNDING = 1e-9
"""The same of what is computed in float64 from the losses: another processor may round an exponential differently."""
CLOCKS = [*OF_CLOCKS, "mixing_seconds"]
"""Metrics of a step that measure time, and are not compared."""


class Finding(NamedTuple):
    """One comparison.

    kind   files, inputs, split, examples, losses, weights, model or figures
    same   None: not compared, and `note` says why
    note   what was compared, or what differs: expected by the run, found by the replay
    exact  False: equal but for rounding
    """

    kind: str
    same: bool | None
    note: str
    exact: bool = True


def findings_of(
    kind: str,
    where: str,
    expected: Mapping[str, Any] | pd.DataFrame,
    replayed: Mapping[str, Any] | pd.DataFrame,
    relative: Mapping[str, float] = {},
) -> list[Finding]:
    """Compare values by name: tensors, columns of a table or a log, or single values of any kind.

    relative  name -> largest relative difference at which its values count as the same; 0 for all others
    """
    findings = list[Finding]()
    exact = True
    for name in dict.fromkeys([*expected, *replayed]):
        # [1, 2, 3] and [1, 2] become [1, 2, 3] and [1, 2, nan], which differ in the last.
        both = _series(expected.get(name)).align(_series(replayed.get(name)))
        # A column of texts compares with no number of 400 digits.
        then, now = (one if one.dtype.kind in "biuf" else one.astype(object) for one in both)
        same = (then == now) | (then.isna() & now.isna())  # NaN and null equal themselves here
        exact &= bool(same.all())  # before rounding is allowed
        if bound := relative.get(name):
            x, y = (values.map(_number) for values in (then, now))
            same |= (x - y).abs() <= bound * y.abs()
        if not same.all():
            first = same.idxmin()  # False < True
            place = f"{where}, {name}, {first}" if same.size > 1 else f"{where}, {name}"
            values = (values.astype(object)[first] for values in (then, now))  # 5 and not 5.0
            old, new = (None if value != value else value for value in values)
            note = f"{place}; {(~same).sum()} of {same.size} values differ: expected {old}, found {new}"
            findings.append(Finding(kind, False, note, False))
    names, how = list(expected), "bit for bit" if exact else "but for rounding"
    listed = (", ".join(names) or "no values") if len(names) <= 20 else f"{len(names)} values"
    return findings[:MOST] or [Finding(kind, True, f"{where}, {listed}, {how}", exact)]


def by_another_version(found: Finding) -> Finding:
    """Return a finding on files that another version may have written in another way: a difference says nothing."""
    return found if found.same else Finding(found.kind, None, f"{found.note}; another version of sftmix made them")


def _number(value: Any) -> float:
    """Return a value as a number; NaN, which stays different, for any other."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _series(values: Any) -> pd.Series:
    if isinstance(values, torch.Tensor):
        # bfloat16 and float32 are the same numbers in float64.
        return pd.Series(values.detach().double().flatten().numpy())
    return values if isinstance(values, pd.Series) else pd.Series(values if isinstance(values, list) else [values])


def compare_logs(
    run: Sequence[Mapping[str, Any]],
    replay: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
    precision: str | None,
) -> list[Finding]:
    """Compare the lines of metrics.jsonl of these steps: first entries about the examples, then all others.

    Entries of callbacks are compared only bit for bit, and only if run and replay have them in the same steps. The
    learning rate is computed in float64; in the norm of the gradient the rounding of earlier steps grows fastest.

    precision  fp32 or bf16 if another machine made the replay; None: the numbers must be equal bit for bit
    """
    bound = RELATIVE[precision]
    relative = dict.fromkeys(OF_LOSSES, bound) | {
        "learning_rate": min(bound, RELATIVE["fp32"]),
        "grad_norm": 10 * bound,
    }
    logs = []
    for log in (run, replay):
        table = pd.DataFrame(log).set_index("step").reindex(steps).rename("step {}".format)  # a lost line is one of NaN
        # Empty, in all steps of the window, is eval_nll if none of them measured it.
        logs.append(table.drop(columns=CLOCKS, errors="ignore").dropna(axis=1, how="all"))
    then, now = logs[0].align(logs[1], axis=1)
    of_callbacks = then.columns.difference([*OF_EXAMPLES, *OF_LOSSES])
    # eval_nll of steps 2 and 4 there, and of 4 alone here: it is not claimed.
    omitted = [name for name in of_callbacks if precision or not then[name].isna().equals(now[name].isna())]
    unknown = [name for name in OF_LOSSES if name in now and not any(name in line for line in run)]
    examples = [name for name in then if name in OF_EXAMPLES]
    numbers = then.columns.drop([*examples, *omitted, *unknown])
    return [
        *(Finding("losses", None, f"{name}: it is of a callback, and of other steps or machines") for name in omitted),
        *(Finding("losses", None, f"{name}: the version that made the run did not log it") for name in unknown),
        *findings_of("examples", "metrics.jsonl", then[examples], now[examples]),
        *findings_of("losses", "metrics.jsonl", then[numbers], now[numbers], relative),
    ]
