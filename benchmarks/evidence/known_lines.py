"""The part of the page of results on rows whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from performance_tables import table as grid

from benchmarks.evidence.known_rows import SHARES
from sftmix.common.files import read_json
from sftmix.compare.statistics import ALPHA, mean_sd

MARGINS = {"gap": 0.05, "exact": 0.02}
TITLES = {
    "gap": "Gap: NLL of corrupted training rows minus that of clean ones, nats per token",
    "exact": "Exact match of held-out deterministic rows",
}


def known_lines(results: Path) -> Iterator[str]:
    """Yield what was collected in the folder of results; the tests are those of the tables that are finished."""
    tables = {share: results / f"corrupted-{share}.json" for share in SHARES}
    found = {share: read_json(path) for share, path in tables.items() if path.exists()}
    done = {share: each for share, each in found.items() if each["complete"]}
    if not done:
        yield f"No table of it is finished ({len(found)} of {len(tables)} have begun)."
        return
    tests = read_json(results / "contrasts.json")
    yield f"Finished: {', '.join(f'{share}%' for share in done)} of the responses corrupted."
    yield ""
    rows = [
        (f"{share}%", *(_mean(each[name]) for name in ("deterministic", "within_families", "all")), _found(each))
        for share, each in tests["auc"].items()
    ]
    if rows:
        yield from grid(("AUC of confidence", "deterministic", "within families", "among all rows", "result"), rows)
    for key, title in TITLES.items():
        yield from (f"{title}:", "")
        rows = [
            (f"{share}%", name.replace(" - ", " − "), *_tested(each, MARGINS[key]))
            for name, shares in tests[key].items()
            for share, each in shares.items()
        ]
        yield from grid(("corrupted", "contrast", "mean, 95% interval", "p", "p (Holm)", "result"), rows)
    yield from ("Not tested, means over the seeds:", "")
    head = (
        "corrupted",
        "arm",
        "NLL, clean",
        "NLL, corrupted",
        "NLL, open",
        "held-out NLL, last",
        "best",
        "exact match",
    )
    yield from grid(head, [row for share, table in done.items() for row in _arm_rows(share, table)])


def _mean(figures: Mapping[str, Any], form: str = ".4f") -> str:
    ends = figures["interval"]
    return f"{figures['mean']:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def _found(auc: Mapping[str, Any]) -> str:
    ends = auc["deterministic"]["interval"]
    low = ends[0] if ends else 0.0
    return "found well" if low > 0.8 else "found" if low > 0.5 else "not found"


def _tested(contrast: Mapping[str, Any], margin: float) -> tuple[str, str, str, str]:
    ends, different = contrast["interval"], contrast["p_holm"] <= ALPHA
    equal = ends is not None and -margin < ends[0] <= ends[1] < margin
    words = [f"different: {'lower' if contrast['mean'] < 0 else 'higher'}"] * different + [
        f"equal within {margin}"
    ] * equal
    return (
        _mean(contrast, "+.4f"),
        f"{contrast['p']:.4f}",
        f"{contrast['p_holm']:.4f}",
        ", and ".join(words) or "undecided",
    )


def _arm_rows(share: int, table: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for arm, by_seed in table["runs"].items():
        runs = list(by_seed.values())
        nll = [[run["train_nll"].get(truth) for run in runs] for truth in ("clean", "corrupted", "open")]
        ends = [[run[name] for run in runs] for name in ("eval_nll_after", "eval_nll_best")]
        columns = [*nll, *ends, [run["exact"]["deterministic"] for run in runs]]
        cells = ("-" if None in values else f"{mean_sd(values)[0]:.4f}" for values in columns)
        yield (f"{share}%", arm, *cells)
