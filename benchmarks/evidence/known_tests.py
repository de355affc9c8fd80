"""The planned tests of rows whose truth is known."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.evidence.findings import holm_of_planned
from benchmarks.evidence.known_rows import SHARES
from sftmix.tools.compare.statistics import interval, mean_sd, sign_flip

Tables = Mapping[int, Mapping[str, Any]]
"""Share in percent -> the kept figures of its table."""

CONTRASTS = (("SFTMix", "NTP"), ("SFTMix", "RandomSplit"))
AUCS = ("deterministic", "within_families", "all")


def contrasts(tables: Tables) -> dict[str, Any]:
    """Return the AUCs with their intervals, the planned tests of each contrast, and the parts of the gap without tests.

    tables  the finished ones; Holm's correction counts the others among the planned shares, too
    """
    dirty = {share: table for share, table in tables.items() if share}
    found: dict[str, Any] = {"auc": {}, "gap": {}, "exact": {}, "parts": {}}
    for share, table in dirty.items():
        if table["auc"]:
            found["auc"][str(share)] = {name: _of([each[name] for each in table["auc"].values()]) for name in AUCS}
    for ours, theirs in CONTRASTS:
        name = f"{ours} - {theirs}"
        found["gap"][name] = dict(_tested(dirty, ours, theirs, ("gap",), planned=len(SHARES) - 1))
        found["exact"][name] = dict(_tested(tables, ours, theirs, ("exact", "deterministic"), planned=len(SHARES)))
        parts = {part: dict(_paired(dirty, ours, theirs, ("train_nll", part))) for part in ("corrupted", "clean")}
        found["parts"][name] = {share: {part: by[share] for part, by in parts.items()} for share in parts["clean"]}
    return found


def _tested(
    tables: Tables, ours: str, theirs: str, keys: Sequence[str], *, planned: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield share -> paired differences at it, with the exact sign-flip test and Holm over the planned shares."""
    found = dict(_paired(tables, ours, theirs, keys))
    p_values = [sign_flip(each["differences"]) for each in found.values()]
    for (share, each), p, p_holm in zip(found.items(), p_values, holm_of_planned(p_values, planned), strict=True):
        yield share, {**each, "p": p, "p_holm": p_holm}


def _paired(tables: Tables, ours: str, theirs: str, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield share -> the differences of a figure at the seeds that both arms have; a share without any is left out."""
    for share, table in tables.items():
        a, b = (table["runs"].get(arm, {}) for arm in (ours, theirs))
        seeds = sorted(a.keys() & b.keys(), key=int)
        differences = [_figure(a[seed], keys) - _figure(b[seed], keys) for seed in seeds]
        if seeds:
            yield str(share), {**_of(differences), "seeds": [int(seed) for seed in seeds], "differences": differences}


def _figure(run: Mapping[str, Any], keys: Sequence[str]) -> float:
    value: Any = run
    for key in keys:
        value = value[key]
    return float(value)


def _of(values: Sequence[float]) -> dict[str, Any]:
    mean, sd = mean_sd(values)
    return {"mean": mean, "sd": sd, "interval": interval(values)}
