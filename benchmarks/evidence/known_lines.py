"""The part of the page of results on rows whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from performance_tables import table as grid

from benchmarks.evidence.forest import Line, forest
from benchmarks.evidence.known_outcomes import outcome_rows
from benchmarks.evidence.known_predictions import prediction_rows
from benchmarks.evidence.known_rows import SHARES
from benchmarks.evidence.known_tests import AUCS, MARGINS, contrast_at, found_by
from benchmarks.evidence.tiers import IMAGES
from sftmix.common.files import read_json
from sftmix.tools.compare.statistics import mean_sd
from sftmix.tools.quickstart.tasks import DETERMINISTIC

Tables = Mapping[int, Mapping[str, Any]]
"""Share in percent -> the kept figures of its finished table."""

TITLES = {
    "gap": "Gap: NLL of corrupted training rows minus that of clean ones, nats per token",
    "exact": "Exact match of held-out deterministic rows",
}
ARMS = ("NTP", "SFTMix", "RandomSplit")


def known_lines(results: Path) -> Iterator[str]:
    """Yield what was collected in the folder of results; the tests are those of the tables that are finished."""
    files = {share: results / f"corrupted-{share}.json" for share in SHARES}
    found = {share: read_json(path) for share, path in files.items() if path.exists()}
    done = {share: each for share, each in found.items() if each["complete"]}
    yield from _state(found, done)
    if not done:
        return
    tests = read_json(results / "contrasts.json")
    yield from ("What each outcome means, in the words of the plan:", "")
    yield from grid(("corrupted", "figure", "outcome", "meaning"), list(outcome_rows(tests, list(done))))
    yield from ("What was predicted; ranges and orders are those of means, and are not tested:", "")
    predictions = list(prediction_rows(tests, list(done)))
    yield from grid(("prediction", "what was predicted", "what came", "result"), predictions)
    yield from _test_lines(tests)
    yield from _described_lines(done)


def _state(found: Tables, done: Tables) -> Iterator[str]:
    if not done:
        yield f"No table of it is finished ({len(found)} of {len(SHARES)} have begun)."
        return
    yield f"Finished: {', '.join(f'{share}%' for share in done)} of the responses corrupted."
    lost = [
        f"{arm} at {share}%, seed {', '.join(map(str, seeds))}"
        for share, table in done.items()
        for arm, seeds in table["diverged"].items()
    ]
    if lost:
        yield f"Diverged, and so missing from the contrasts: {'; '.join(lost)}."
    else:
        yield "No run of it diverged."
    yield ""


# ------------------------------------------------------------------------------------------------- tests


def _test_lines(tests: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (f"{share}%", *(_mean(each[name]) for name in AUCS), found_by(each)) for share, each in tests["auc"].items()
    ]
    if rows:
        yield from grid(("AUC of confidence", "deterministic", "within families", "among all rows", "result"), rows)
    for figure, title in TITLES.items():
        rows = [
            (f"{share}%", _name(contrast), *_tested(tests, figure, contrast, share))
            for contrast, shares in tests[figure].items()
            for share in map(int, shares)
        ]
        if rows:
            yield from (
                f"{title}:",
                "",
                f"![{title}: paired differences]({IMAGES}/{_picture(figure)})",
                "",
            )
            yield from grid(("corrupted", "contrast", "seeds", "mean, 95% interval", "p", "p (Holm)", "result"), rows)
    rows = [
        (f"{share}%", _name(contrast), _mean(each["corrupted"], "+.4f"), _mean(each["clean"], "+.4f"))
        for contrast, shares in tests["parts"].items()
        for share, each in shares.items()
    ]
    if rows:
        yield from ("The two parts of the gap, not tested:", "")
        yield from grid(("corrupted", "contrast", "NLL of corrupted rows", "NLL of clean rows"), rows)


def known_pictures(results: Path) -> dict[str, str]:
    """Return file name -> SVG text of the tested figures of the finished tables."""
    tests = read_json(path) if (path := results / "contrasts.json").exists() else {}
    units = {"gap": "nats per token", "exact": "share of rows"}
    made = {}
    for figure, title in TITLES.items():
        lines = [
            Line(f"{share}%: {_name(contrast)}", _by_seed(each), each["mean"], each["interval"])
            for contrast, shares in tests.get(figure, {}).items()
            for share, each in shares.items()
        ]
        if lines:
            made[_picture(figure)] = forest(title, lines, [], margin=MARGINS[figure], unit=units[figure])
    return made


def _picture(figure: str) -> str:
    return f"known-truth-{figure}.svg"


def _by_seed(each: Mapping[str, Any]) -> dict[int, float]:
    return dict(zip(each["seeds"], each["differences"], strict=True))


def _name(contrast: str) -> str:
    return contrast.replace(" - ", " − ")


def _mean(figures: Mapping[str, Any], form: str = ".4f") -> str:
    ends = figures["interval"]
    return f"{figures['mean']:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def _tested(tests: Mapping[str, Any], figure: str, contrast: str, share: int) -> tuple[str, ...]:
    found, result = tests[figure][contrast][str(share)], contrast_at(tests, figure, contrast, share)
    assert result is not None
    p_values = (f"{found[name]:.4f}" for name in ("p", "p_holm"))
    return (str(len(found["differences"])), _mean(found, "+.4f"), *p_values, result.result)


# --------------------------------------------------------------------------------------------- described


def _described_lines(done: Tables) -> Iterator[str]:
    yield from ("Not tested, means over the seeds:", "")
    nll = ("NLL, clean", "NLL, corrupted", "NLL, open")
    head = ("corrupted", "arm", *nll, "held-out NLL, last", "best", "exact match")
    yield from grid(head, [row for share, table in done.items() for row in _arm_rows(share, table)])
    yield from (f"Exact match by deterministic family, means over the seeds, not tested: {' / '.join(ARMS)}.", "")
    rows = [(name, *(_by_arm(table, name) for table in done.values())) for name in sorted(DETERMINISTIC)]
    yield from grid(("family", *(f"{share}% corrupted" for share in done)), rows)


def _arm_rows(share: int, table: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for arm in ARMS:
        runs = list(table["runs"].get(arm, {}).values())
        nll = [[run["train_nll"].get(truth) for run in runs] for truth in ("clean", "corrupted", "open")]
        ends = [[run[name] for run in runs] for name in ("eval_nll_after", "eval_nll_best")]
        columns = [*nll, *ends, [run["exact"]["deterministic"] for run in runs]]
        yield (f"{share}%", arm, *(_average(values, ".4f") for values in columns))


def _by_arm(table: Mapping[str, Any], family: str) -> str:
    """Write the exact match of a family in each arm."""
    runs = (table["runs"].get(arm, {}).values() for arm in ARMS)
    return " / ".join(_average([run["exact_by_family"][family] for run in own], ".2f") for own in runs)


def _average(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{mean_sd(known)[0]:{form}}" if known else "-"
