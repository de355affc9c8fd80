"""The quickstart: the recipe and the NTP baseline on rows whose truth is known, and a table of the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sftmix.config import RunConfig
from sftmix.config.layers import config_file
from sftmix.config.read import read_config
from sftmix.pipeline.recipe import run
from sftmix.tools.quickstart import Materials, materialise


def quickstart(out: str | Path, seed: int) -> dict[str, Any]:
    """Make model and rows under `out`, run the recipe and the baseline, print the table; return the summary.

    A second call on the same directory reads what is there.
    """
    out = Path(out)
    print(f"Making a small model, a tokenizer and rows of known truth in {out}/materials ...", flush=True)
    made = materialise(out / "materials", seed=seed)
    config = configuration(out, made, seed)
    summary = run(config)
    print("\n".join(["", *table(out, summary)]), flush=True)
    return summary


def configuration(out: Path, made: Materials, seed: int) -> RunConfig:
    """Return the recipe quickstart.yaml with these materials."""
    config = read_config(config_file("recipe:quickstart"))
    return replace(
        config,
        out=str(out),
        seed=seed,
        with_baseline=True,
        model=replace(config.model, path=str(made.model)),
        data=replace(config.data, train=[str(made.train)], eval=[str(made.eval)]),
    )


def table(out: Path, summary: dict[str, Any]) -> list[str]:
    """Return the lines of the results, whoever won, and of the next things to look at."""
    baseline = summary["baseline"]
    rows = [
        ("held-out NLL per response token", f"{baseline['eval_nll_after']:.4f}", f"{summary['eval_nll_after']:.4f}"),
        ("held-out exact match", f"{baseline['eval_exact_match']:.1%}", f"{summary['eval_exact_match']:.1%}"),
    ]
    lines = [f"{'':<36}{'NTP':>10}{'SFTMix':>10}", *(f"{name:<36}{a:>10}{b:>10}" for name, a, b in rows)]
    confident, unconfident = (
        summary["confidence"][half]["labels"].get("deterministic", 0.0) for half in ("confident", "unconfident")
    )
    lines += [
        "",
        f"Deterministic tasks are {confident:.0%} of the confident half, {unconfident:.0%} of the unconfident one.",
        "One seed and a toy model: the table shows that the recipe runs, not which method is better.",
        "",
        "Next:",
        f"  sftmix status {out}",
        f"  {out}/summary.json                      figures, most and least confident examples",
        f"  {out}/confidence/confidence.parquet     one confidence per example",
        f"  {out}/train/metrics.jsonl               one line per step",
        f"  {out}/train/model                       loads with AutoModelForCausalLM",
        "  sftmix run --model.path NAME --data.train rows.json --data.eval_fraction 0.05 --out runs/first",
    ]
    return lines
