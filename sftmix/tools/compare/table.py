"""The table of finished cells: a plain value that table.json holds, and that the other files show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import sftmix
from sftmix.common.figures import flatten, markdown_table, short, unit_of
from sftmix.common.files import read_json, write_json, write_text
from sftmix.pipeline.directory import differences
from sftmix.tools.compare.plan import Comparison, shown_options
from sftmix.tools.compare.statistics import (
    ALPHA,
    MIN_SEEDS,
    holm,
    interval,
    mean_sd,
    per_example,
    sign_flip,
)
from sftmix.types import Float64

SETTINGS = ("seed", "world_size", "data.max_length")
"""Numbers of a summary.json that are chosen, not measured: their means over seeds say nothing."""
RATIOS = {"eval_nll_after": "nll_sum", "eval_accuracy": "n_correct", "calibration.brier": "brier_sum"}
"""Metrics that are a sum over examples / the number of response tokens, with the numerator's column of eval.parquet."""
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


def build_table(comparison: Comparison, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the table of the finished cells; `complete` is True if these are all.

    summaries  name of a cell -> what its run returned; empty if its target diverged
    A run has as metrics every finite number of its summary but SETTINGS, nested ones with dots. Only a complete table
    has contrasts: testing a part of the seeds would be one of many looks.
    """
    from sftmix.measure.summary import git_revision

    options, complete = comparison.options, len(summaries) == len(comparison.cells)
    variants = {name: _variant(comparison, name, summaries) for name in comparison.variants}
    contrasts = [_contrast(comparison, variants, pair) for pair in comparison.contrasts if complete]
    # Count all planned contrasts: one that could not be measured makes the others no more significant.
    adjusted = holm([1.0 if c["p"] is None else c["p"] for c in contrasts])
    for contrast, p_holm in zip(contrasts, adjusted, strict=True):
        contrast["p_holm"] = None if contrast["p"] is None else p_holm
        contrast["verdict"] = "different" if p_holm <= ALPHA else "no difference shown"
        if len(contrast["seeds"]) < MIN_SEEDS:
            contrast["verdict"] = f"not tested: {len(contrast['seeds'])} of at least {MIN_SEEDS} seeds"
    makers = [(one.get("version"), one.get("git_revision")) for one in summaries.values()]
    return {
        "complete": complete,
        "runs_done": len(summaries),
        "runs": len(comparison.cells),
        "metric": options.metric,
        "baseline": comparison.baseline,
        "variants": variants,
        "contrasts": contrasts,
        "options": asdict(options),
        "seed": comparison.variants[comparison.baseline].seed,
        "versions": {"sftmix": sftmix.__version__, "git_revision": git_revision()},
        "trained_by": sorted({" ".join(filter(None, maker)) for maker in makers} - {""}),
    }


def _variant(comparison: Comparison, variant: str, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return options, means over seeds, and the metrics of each run; `no_value` lists seeds without the metric."""
    runs = list[dict[str, Any]]()
    for cell in comparison.cells:
        if cell.variant == variant and cell.name in summaries:
            numbers = flatten(summaries[cell.name])
            metrics = {name: x for name, x in numbers if name not in SETTINGS and math.isfinite(x)}
            runs.append({"seed": cell.seed, "run": cell.name, "metrics": metrics})
    figures = {}
    for metric in dict.fromkeys(metric for run in runs for metric in run["metrics"]):
        values = [run["metrics"][metric] for run in runs if metric in run["metrics"]]
        mean, sd = mean_sd(values)
        figures[metric] = {"seeds": len(values), "mean": mean, "sd": sd}
    no_value = [run["seed"] for run in runs if comparison.options.metric not in run["metrics"]]
    return {"options": comparison.options_of(variant), "metrics": figures, "no_value": no_value, "runs": runs}


def _contrast(comparison: Comparison, variants: Mapping[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
    """Return the figures of a contrast; None for what too few seeds do not give."""
    root, metric = Path(comparison.out or ""), comparison.options.metric
    both = list(zip(*(variants[name]["runs"] for name in pair), strict=True))
    inputs = [[read_json(root / run["run"] / "train" / "inputs.json") for run in runs] for runs in both]
    changes = [line for ours, theirs in inputs for line in differences(ours, theirs)]
    measured = [runs for runs in both if all(metric in run["metrics"] for run in runs)]
    values = [ours["metrics"][metric] - theirs["metrics"][metric] for ours, theirs in measured]
    mean, sd = mean_sd(values) if values else (None, None)
    files = [root / run["run"] / "train" / "eval.parquet" for runs in measured for run in runs]
    of_examples = _differences(files, RATIOS[metric]) if values and metric in RATIOS else None
    over = [*["seeds"] * (len(values) > 1), *["examples"] * (of_examples is not None)]
    return {
        "ours": pair[0],
        "theirs": pair[1],
        "seeds": [ours["seed"] for ours, _ in measured],
        "inputs_that_differ": sorted({line.partition(": ")[0] for line in changes}),
        "differences": values,
        "mean": mean,
        "sd": sd,
        "p": None if sd is None else sign_flip(values),
        "interval": interval(values if of_examples is None else of_examples) if over else None,
        "interval_over": " and ".join(over) or None,
    }


def _differences(files: Sequence[Path], numerator: str) -> Float64 | None:
    """Return f64[S, N], the differences of the examples; None without per-example files of the same held-out rows.

    files  of the runs of a contrast, ours and theirs by turns
    """
    import pandas as pd

    if not all(file.exists() for file in files):
        return None
    frames = [pd.read_parquet(file).set_index("id").reindex(columns=[numerator, "n_tokens"]) for file in files]
    table = pd.concat(frames, axis=1).sort_index()
    if table.isna().any(axis=None):  # other rows, or files without the column
        return None
    sums = np.ascontiguousarray(table.to_numpy(np.float64).T).reshape(-1, 2, 2, len(table))
    ours, theirs = (per_example(sums[:, side, 0], sums[:, side, 1]) for side in (0, 1))
    return ours - theirs


# ---------------------------------------------------------------------------------------------- files


def write_table(directory: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Write table.json, table.md, and cells.csv with a row for each run; return the table."""
    import pandas as pd

    write_json(directory / "table.json", table)
    write_text(directory / "table.md", markdown(table))
    rows = []
    for name, variant in table["variants"].items():
        rows += [{"variant": name, "seed": r["seed"], "run": r["run"], **r["metrics"]} for r in variant["runs"]]
    write_text(directory / "cells.csv", pd.DataFrame(rows).to_csv(index=False))
    return table


def markdown(table: Mapping[str, Any]) -> str:
    """Return table.md: the metric and further figures of each variant, the contrasts, and what they can carry."""
    variants, seeds, metric = table["variants"], len(table["options"]["seeds"]), table["metric"]
    parts = [f"# {metric}: {len(variants)} variants x {seeds} seeds"]
    if not table["complete"]:
        parts.append(f"**INCOMPLETE: {table['runs_done']} of {table['runs']} runs are done.**")
    if table["contrasts"]:
        parts += [markdown_table([CONTRASTS, *(_contrast_row(c, seeds) for c in table["contrasts"])]), NOTES]
    for name, variant in variants.items():
        if variant["no_value"]:
            seeds_without = ", ".join(map(str, variant["no_value"]))
            parts.append(
                f"**{name}: no finite {metric} at seeds {seeds_without}. Such runs (diverged, or not measured) are in "
                "no mean and no contrast, which flatters a variant that diverges.**"
            )
    parts.append(f"## Figures\n\nMean ± standard deviation over seeds. {metric}: {unit_of(metric) or 'no unit'}.")
    known = list(dict.fromkeys(name for variant in variants.values() for name in variant["metrics"]))
    names = [metric]
    for group in SHOWN if table["options"]["metrics"] is None else table["options"]["metrics"]:
        names += [name for name in known if name == group or name.startswith(f"{group}.")]
    figures = [[name, *(_figure(variant, name) for variant in variants.values())] for name in dict.fromkeys(names)]
    parts.append(markdown_table([["figure", *variants], *figures]))
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


def _figure(variant: Mapping[str, Any], name: str) -> str:
    """Return mean ± sd, and the number of seeds where some lack the figure."""
    figures, runs = variant["metrics"].get(name), len(variant["runs"])
    if figures is None:
        return "-"
    spread = "" if figures["sd"] is None else f" ± {short(figures['sd'], digits=2)}"
    some = f" ({figures['seeds']} of {runs} seeds)" if figures["seeds"] < runs else ""
    return f"{short(figures['mean'], digits=5)}{spread}{some}"
