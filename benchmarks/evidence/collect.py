"""Keep what is small of a table of the study: what was run, and a short summary of each run.

    python benchmarks/evidence/collect.py --table runs/evidence/primary --name primary

benchmarks/results/evidence/NAME.parquet (study.py) then holds the options and versions of the table, and a line for
each finished run: the numbers of summary.json without any text of rows, the held-out NLL per token by quartile of
response length, the NLL per token of a sample of the training rows by half of the confidence, before and after, the
hash of the confidences, and the losses of single examples. Of a run that diverged the line says that alone. It may be
called while the table is unfinished; the next call adds what has come since, also from another directory with other
seeds of the same table. Statistics are made by results.py, from all sittings together.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.losses import with_losses  # noqa: E402
from benchmarks.evidence.study import read_study, write_study  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.files import MANIFEST, read_json  # noqa: E402
from sftmix.disk.hashes import sha256_file  # noqa: E402
from sftmix.disk.tables import read_columns, read_dynamics, read_split  # noqa: E402
from sftmix.tools.compare.plan import has_diverged  # noqa: E402
from sftmix.words.errors import NonFiniteError, SFTMixError  # noqa: E402

TEXT = ("least_confident", "most_confident", "data", "model")
"""Entries of summary.json that hold text of rows, or names of this machine."""
OF_ANSWERS = ("answers", "ended", "words_to_reference", "medmcqa")
"""Figures of a run that real/answers.py adds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="directory of a table that compare wrote")
    parser.add_argument("--name", required=True, help="name of the results")
    parser.add_argument("--halves", default="SFTMix", help="variant whose split by confidence tells the halves")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all results")
    options = parser.parse_args()
    file = options.out / f"{options.name}.parquet"
    try:
        kept = collect(options.table, file, halves=options.halves)
    except SFTMixError as error:
        sys.exit(f"error: {error}")
    print(f"{kept} runs in {file}")


def collect(table: Path, file: Path, *, halves: str) -> int:
    """Write what is kept of a table to the file, and return the number of its finished runs.

    Runs in the directory that are not of this table (two tables may share one) are left out.

    halves  the variant whose split.parquet names the confident and the unconfident rows of each seed
    Raises ConfigError for a run with other held-out rows than those kept; nothing is written then.
    """
    plan, study = read_json(table / "table.json"), read_study(file)
    # Statistics are made from all sittings, by results.py.
    before = study.about
    study.about |= {
        "variants": {name: found["options"] for name, found in plan["variants"].items()},
        "seed": plan["seed"],
        "options": plan["options"]
        | {"seeds": sorted({*before.get("options", {}).get("seeds", ()), *plan["options"]["seeds"]})},
        "trained_by": sorted({*before.get("trained_by", ()), *plan["trained_by"]}),
    }
    kept = 0
    for run, variant, seed in _runs(table, plan):
        if (run / "train" / MANIFEST).exists() and (run / "summary.json").exists():
            answers = {name: x for name, x in study.runs.get((variant, seed), {}).items() if name in OF_ANSWERS}
            split = table / halves / f"seed-{seed}" / "split" / "split.parquet"
            study.runs[variant, seed] = reduced(run, split) | answers | {"seed": seed}
            kept += 1
        elif has_diverged(run):
            study.runs[variant, seed] = {"seed": seed, "exit_code": NonFiniteError.exit_code}
    study.losses = with_losses(study.losses, _runs(table, plan))
    write_study(file, study)
    return kept


def _runs(table: Path, plan: Mapping[str, Any]) -> Iterator[tuple[Path, str, int]]:
    """Directory, variant and seed of each run that the table has, or is to have."""
    for variant in plan["variants"]:
        for seed in plan["options"]["seeds"]:
            yield table / variant / f"seed-{seed}", variant, seed


def reduced(run: Path, split: Path) -> dict[str, Any]:
    """The numbers of a run: summary.json without text, and the NLL by length and by half.

    split  names the halves; the NLL by half is left out where there is no such file
    """
    summary = {k: v for k, v in read_json(run / "summary.json").items() if k not in TEXT}
    summary["eval_nll_by_length"] = by_length(run / "train" / "eval.parquet")
    samples = {"before": run / "base" / "sample.parquet", "after": run / "train" / "sample.parquet"}
    if (confidence := run / "confidence" / "confidence.parquet").exists():
        summary["confidence_sha256"] = sha256_file(confidence)
    if split.exists():
        summary["sample_nll_by_half"] = {when: by_half(path, split) for when, path in samples.items()}
    return summary


def by_length(path: Path) -> list[dict[str, float]]:
    """Held-out rows by quartile of response tokens, shortest first: rows, tokens, nats per token.

    Equal lengths are ordered by id, so the quartiles hold the same rows in every run.
    """
    table = read_columns(path, "id", "nll_sum", "n_tokens")
    ids, nll_sum, n_tokens = table["id"], table["nll_sum"], table["n_tokens"]
    ranked = sorted(range(len(ids)), key=lambda row: (n_tokens[row], ids[row]))
    return [_group(nll_sum[rows], n_tokens[rows]) for rows in np.array_split(ranked, 4)]


def by_half(path: Path, split: Path) -> dict[str, dict[str, float]]:
    """Group of the split -> rows of the sample in it, their tokens, nats per token."""
    ids, groups = read_split(split)
    group_of = dict(zip(ids, groups.group.tolist(), strict=True))
    sample = read_dynamics(path)
    group = np.array([group_of[example] for example in sample.ids])
    nll, tokens = sample.nll_sum[:, 0], sample.n_tokens
    return {name: _group(nll[group == g], tokens[group == g]) for g, name in enumerate(groups.names)}


def _group(nll_sum: np.ndarray, n_tokens: np.ndarray) -> dict[str, float]:
    tokens = int(n_tokens.sum())
    return {"rows": len(n_tokens), "tokens": tokens, "nll": float(nll_sum.sum()) / tokens}


if __name__ == "__main__":
    main()
