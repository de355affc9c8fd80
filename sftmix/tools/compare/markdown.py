"""The table as people read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sftmix.common.figures import markdown_table, short, unit_of

SHOWN = (
    *("eval_nll_after", "eval_nll_best", "eval_nll_before", "eval_accuracy", "eval_exact_match", "calibration"),
    *("mu_effective", "ntp_tokens", "mixup_tokens", "confidence_std", "confounds"),
    "stages.train.wall_seconds",
)
"""Figures and groups of figures that are shown unless `metrics` names others; missing ones are left out."""

CONTRASTS = ["contrast", "seeds", "difference", "95% interval", "over", "p", "p (Holm)", "result", "inputs that differ"]

NOTES = """\
- p: two-sided sign-flip test over the seeds; Holm over all contrasts; the result is by p after Holm alone.
- 95% interval: Student's t, not corrected for several contrasts.
- Inputs that differ are those of the training. The order of the examples follows from data, split, confidence,
  pairing, seed, epochs and batch size: where one of them differs, it is part of the difference. Where none differs,
  both are the same training."""


def markdown(table: Mapping[str, Any]) -> str:
    """Return table.md: the metric and further figures of each variant, the contrasts, and what they can carry."""
    variants, seeds, metric = table["variants"], table["options"]["seeds"], table["metric"]
    parts = [f"# {metric}: {len(variants)} variants x {len(seeds)} seeds"]
    if not table["complete"]:
        parts.append(f"**INCOMPLETE: {table['runs_done']} of {table['runs']} runs are done.**")
    if table["contrasts"]:
        parts += [markdown_table([CONTRASTS, *(_contrast_row(c, len(seeds)) for c in table["contrasts"])]), NOTES]
    for name, variant in table["variants"].items():
        if variant["no_value"]:
            seeds_without = ", ".join(map(str, variant["no_value"]))
            parts.append(
                f"**{name}: no finite {metric} at seeds {seeds_without}. Such runs (diverged, or not measured) are in "
                "no mean and no contrast, which flatters a variant that diverges.**"
            )
    parts.append(f"## Figures\n\nMean ± standard deviation over seeds. {metric}: {unit_of(metric) or 'no unit'}.")
    parts.append(markdown_table(_figure_rows(table)))
    options = [[name, shown_options(variant["options"])] for name, variant in variants.items()]
    parts += ["## Variants", markdown_table([["variant", "options that are not the same in all"], *options])]
    parts.append(f"Trained by sftmix {', '.join(table['trained_by'])}.")
    return "\n\n".join(parts) + "\n"


def _contrast_row(contrast: Mapping[str, Any], planned: int) -> list[str]:
    interval, numbers = contrast["interval"], [contrast["p"], contrast["p_holm"]]
    return [
        f"{contrast['ours']} − {contrast['theirs']}",
        f"{len(contrast['seeds'])} of {planned}",
        "-" if contrast["mean"] is None else f"{contrast['mean']:+.4f}",
        "-" if interval is None else "[{:+.4f}, {:+.4f}]".format(*interval),
        contrast["interval_over"] or "-",
        *("-" if number is None else short(number) for number in numbers),
        contrast["verdict"],
        ", ".join(contrast["inputs_that_differ"]) or "none",
    ]


def _figure_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each figure that is shown: mean ± sd, and the number of seeds where some lack the figure."""
    variants, chosen = table["variants"], table["options"]["metrics"]
    known = list(dict.fromkeys(name for variant in variants.values() for name in variant["metrics"]))
    names = [table["metric"]]
    for group in SHOWN if chosen is None else chosen:
        names += [name for name in known if name == group or name.startswith(f"{group}.")]
    rows = [["figure", *variants]]
    for name in dict.fromkeys(names):
        row = [name]
        for variant in variants.values():
            figures, runs = variant["metrics"].get(name), len(variant["runs"])
            cell = "-"
            if figures is not None:
                cell = short(figures["mean"], digits=5)
                cell += "" if figures["sd"] is None else f" ± {short(figures['sd'], digits=2)}"
                cell += f" ({figures['seeds']} of {runs} seeds)" if figures["seeds"] < runs else ""
            row.append(cell)
        rows.append(row)
    return rows


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
