"""`quickstart`: the recipe and the NTP baseline on rows and a model made on the spot, and a table of the results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftmix.cli.results import say
from sftmix.cli.words import read_words
from sftmix.common.errors import ConfigError

ABOUT = """See the whole recipe work in under three minutes on two CPU cores, without any download.

It generates a small synthetic instruction set whose truth about confidence is known, makes a tokenizer and a small
Llama on the spot, and trains SFTMix beside plain NTP at the same seed. Each stage says what happened; the table at the
end shows whatever came out.

  sftmix quickstart"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="where to write [%(default)s]")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of everything [%(default)s]")


def main(argv: Sequence[str]) -> None:
    """Mark the directory as a quickstart's with this seed, and run; ConfigError if it holds anything else."""
    given = read_words("quickstart", ABOUT, add_options, argv)
    out = Path(given.out)
    say(f"quickstart: a small model on rows of known truth, in {out}")
    marker = out / ".quickstart"
    if marker.exists():
        if (seed := marker.read_text(encoding="utf-8").strip()) != str(given.seed):
            raise ConfigError(f"{out} holds the quickstart of seed {seed}, not {given.seed}; choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something that the quickstart did not write; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{given.seed}\n", encoding="utf-8")
    quickstart(out, given.seed)


def quickstart(out: Path, seed: int) -> None:
    """Make model and rows under `out`, run recipe:quickstart with the baseline, and print the table.

    A second call on the same directory reads what is there.
    """
    from sftmix.config.layers import config_file
    from sftmix.config.read import read_config
    from sftmix.pipeline.recipe import run
    from sftmix.tools.quickstart import materialise

    made = materialise(out / "materials", seed=seed)
    config = read_config(config_file("recipe:quickstart"))
    config = replace(
        config,
        out=str(out),
        seed=seed,
        with_baseline=True,
        model=replace(config.model, path=str(made.model)),
        data=replace(config.data, train=[str(made.train)], eval=[str(made.eval)]),
    )
    print("\n" + table(out, run(config)), flush=True)


def table(out: Path, summary: dict[str, Any]) -> str:
    """Return the results, whoever won, and what to look at next."""
    baseline, halves = summary["baseline"], summary["confidence"]
    ours, theirs = summary["eval_exact_match"], baseline["eval_exact_match"]
    sure, unsure = (halves[name]["labels"].get("deterministic", 0.0) for name in ("confident", "unconfident"))
    return f"""{"":36}       NTP    SFTMix
held-out NLL per response token     {baseline["eval_nll_after"]:10.4f}{summary["eval_nll_after"]:10.4f}
held-out exact match                {theirs:10.1%}{ours:10.1%}

Deterministic tasks are {sure:.0%} of the confident half, {unsure:.0%} of the unconfident one.
One seed and a toy model: the table shows that the recipe runs, not which method is better.

Next:
  sftmix status {out}
  {out}/summary.json                      figures, most and least confident examples
  {out}/train/model                       loads with AutoModelForCausalLM
  sftmix run --model.path NAME --data.train rows.json --data.eval_fraction 0.05 --out runs/first"""
