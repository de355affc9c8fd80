"""The table as people read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftmix.common.figures import short, unit_of
from sftmix.tools.compare.statistics import smallest_p

SHOWN = (
    *("eval_nll_after", "eval_nll_best", "eval_nll_before", "eval_accuracy", "eval_exact_match", "calibration"),
    *("mu_effective", "ntp_tokens", "mixup_tokens", "confidence_std", "confounds"),
    "stages.train.wall_seconds",
)
"""Figures and groups of figures that are shown unless `metrics` names others; missing ones are left out."""


def markdown(table: Mapping[str, Any]) -> str:
    """Return table.md: the metric and further figures of each variant, the contrasts, and what they can carry."""
    variants, seeds = table["variants"], table["options"]["seeds"]
    incomplete = f"**INCOMPLETE: {table['runs_done']} of {table['runs']} runs are done.**"
    options = [("variant", "options that are not the same in all")]
    options += [(name, shown_options(variant["options"])) for name, variant in variants.items()]
    parts = [
        f"# {table['metric']}: {len(variants)} variants x {len(seeds)} seeds",
        "" if table["complete"] else incomplete,
        _grid(_contrast_rows(table)) if table["contrasts"] else "",
        "\n".join(f"- {note}" for note in _notes(table)),
        "## Figures\n\nMean ± standard deviation over seeds.",
        _grid(_figure_rows(table)),
        "## Variants",
        _grid(options),
        f"Trained by sftmix {', '.join(table['trained_by'])}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _contrast_rows(table: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    yield (
        *("contrast", "seeds", "difference", "95% interval", "over", "p", "p (Holm)", "detectable", "result"),
        "inputs that differ",
    )
    planned = len(table["options"]["seeds"])
    for c in table["contrasts"]:
        interval = "-" if c["interval"] is None else "[{:+.4f}, {:+.4f}]".format(*c["interval"])
        numbers = ["-" if c[key] is None else short(c[key]) for key in ("p", "p_holm", "smallest_effect")]
        yield (
            f"{c['ours']} − {c['theirs']}",
            f"{len(c['seeds'])} of {planned}",
            "-" if c["mean"] is None else f"{c['mean']:+.4f}",
            interval,
            c["interval_over"] or "-",
            *numbers,
            c["verdict"],
            ", ".join(c["inputs_that_differ"]) or "none",
        )


def _notes(table: Mapping[str, Any]) -> Iterator[str]:
    seeds, contrasts = len(table["options"]["seeds"]), len(table["contrasts"])
    if unit := unit_of(table["metric"]):
        yield f"{table['metric']}: {unit}."
    for name, variant in table["variants"].items():
        if variant["no_value"]:
            yield (
                f"**{name}: no finite {table['metric']} at seeds {', '.join(map(str, variant['no_value']))}. Such runs "
                "(diverged, or not measured) are in no mean and no contrast, which flatters a variant that diverges.**"
            )
    if not contrasts:
        return
    if seeds < table["seeds_needed"]:
        yield (
            f"**Nothing here can be called significant: {contrasts} contrasts take {table['seeds_needed']} seeds, and "
            f"these are {seeds}.**"
        )
    yield (
        f"p: two-sided sign-flip test over the seeds, {smallest_p(seeds):.2g} at least with {seeds} of them; Holm over "
        f"{contrasts} contrasts. 95% interval: Student's t, not corrected for several contrasts. Detectable: the true "
        "difference that so many seeds call different four times in five. The result is by p after Holm alone."
    )
    yield (
        "Inputs that differ are those of the training. The order of the examples follows from data, split, confidence, "
        "pairing, seed, epochs and batch size: where one of them differs, it is part of the difference. Where none "
        "differs, both are the same training."
    )


def _figure_rows(table: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    variants, chosen = table["variants"], table["options"]["metrics"]
    known = list(dict.fromkeys(name for variant in variants.values() for name in variant["metrics"]))
    names = [table["metric"]]
    for group in SHOWN if chosen is None else chosen:
        names += [name for name in known if name == group or name.startswith(f"{group}.")]
    yield ("figure", *variants)
    for name in dict.fromkeys(names):
        yield (name, *(_mean(variant["metrics"].get(name), len(variant["runs"])) for variant in variants.values()))


def _mean(figures: Mapping[str, Any] | None, runs: int) -> str:
    """Write mean ± sd, and the number of seeds where some lack the figure."""
    if figures is None:
        return "-"
    spread = "" if figures["sd"] is None else f" ± {short(figures['sd'], digits=2)}"
    lacking = f" ({figures['seeds']} of {runs} seeds)" if figures["seeds"] < runs else ""
    return short(figures["mean"], digits=5) + spread + lacking


def shown_options(options: Mapping[str, object]) -> str:
    """Write options as `key: value; ...`."""
    return "; ".join(f"{key}: {_value(value)}" for key, value in options.items()) or "(none)"


def _value(value: object) -> str:
    """Write a plain value; a component as its class and options, a group as its options that are set."""
    if isinstance(value, Mapping):
        args = value.get("init_args") or {} if "class_path" in value else value
        listed = ", ".join(f"{k}={_value(v)}" for k, v in args.items() if v is not None)
        return f"{value.get('class_path', '').rpartition('.')[2]}({listed})"
    return value if isinstance(value, str) else json.dumps(value)


def _grid(rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its columns aligned for people who read the text."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
