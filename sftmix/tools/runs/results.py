"""What a run says at its end: the figures of summary.json in words (results.txt), and where to look next."""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from sftmix.cli.say import as_word
from sftmix.config.merge import merge
from sftmix.config.schema import ForeignClassError, trusting
from sftmix.pipeline.stages import by_name
from sftmix.tools.runs.output import rendered
from sftmix.words.shown import counted, short


def results(out: str | Path, summary: Mapping[str, Any], until: str, *, own: bool = False) -> list[str]:
    """Return about a dozen lines for people: figures of summary.json, which has all, and commands that go on.

    own  whether the configuration names classes that are not of this package
    """
    out = Path(out)
    seconds = {name: at(summary, f"stages.{name}.wall_seconds") for name in by_name()}
    made = by_name()[until].result
    return rendered(
        "runs/results.txt",
        summary={**dict.fromkeys(("stages", "mu_effective", "confidence", "remarks")), **summary},
        until=until,
        held_out=held_out(summary),
        mixed=at(summary, "confounds.mixed_token_share"),
        times={name: timedelta(seconds=round(taken)) for name, taken in seconds.items() if taken},  # 2:05:00
        files=[str(out / name) for name in (made, "summary.json") if (out / name).exists()],
        place=as_word(out),
        config=as_word(out / "config.yaml"),
        trust=" --trust" if own else "",
        counted=counted,
        short=short,
    ).splitlines()


def names_own_classes(plain: Mapping[str, Any]) -> bool:
    """Return whether a configuration in plain form names a class that is not of this package."""
    try:
        with trusting():
            merge({}, plain)
    except ForeignClassError:
        return True
    return False


def held_out(summary: Mapping[str, Any]) -> list[str]:
    """Return the held-out NLL per token before and after training, and of the baseline; or nothing.

    If there is a baseline, a second line has the difference, and what it means.
    """
    figures = {
        "before": "eval_nll_before",
        "after": "eval_nll_after",
        "NTP baseline": "baseline.eval_nll_after",
        "best": "eval_nll_best",
    }
    values = {name: at(summary, key) for name, key in figures.items()}
    if values["after"] is None:
        return []
    # null: there is no baseline, or none of the evaluations was kept as the best.
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
    lines = [f"held-out NLL per response token (lower is better): {shown}"]
    if isinstance(baseline := values["NTP baseline"], float):
        difference = values["after"] - baseline
        lines.append(f"difference to NTP {difference:+.4f}: one seed decides nothing, see sftmix compare")
    return lines


def at(arm: Mapping[str, Any], key: str) -> Any:
    """Return arm["a"]["b"] for "a.b", or None if it is absent."""
    value: Any = arm
    for name in key.split("."):
        value = (value or {}).get(name)  # a group of summary.json may be null
    return value


def fit_of(run: Path) -> Iterator[tuple[str, float]]:
    """Yield how well a run fits its training rows: NLL per response token of those that it measured at its end.

    It may have measured none of the rows that were chosen after the scoring.
    """
    from sftmix.disk.tables import read_columns, read_dynamics  # not for --help
    from sftmix.pipeline.stages.selection import CHOSEN

    if (file := run / "train" / "sample.parquet").exists():
        sample = read_dynamics(file)
        if (run / CHOSEN).exists():
            sample = sample.of(read_columns(run / CHOSEN, "id")["id"])
        if tokens := sample.n_tokens.sum():
            yield "fit", float(sample.nll_sum[:, -1].sum() / tokens)
