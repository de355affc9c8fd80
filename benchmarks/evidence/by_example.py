"""Ask of which examples the difference between two arms is: the unconfident ones, the short ones, those of a category?

    python benchmarks/evidence/by_example.py --table runs/evidence/primary
    python benchmarks/evidence/by_example.py --table runs/evidence/primary --category topic --out differences.json

It is exploratory: no plan named these groups. For each seed of a finished table it takes the per-example losses of both
arms, on the held-out rows and on the sample of training rows that every run measures, and compares them in groups: by
quartile of the confidence under the base model, by quartile of response length, by half of the split, and by category
where `sftmix report` has written examples with such a column. A difference is that of nats per response token over all
tokens of a group. Intervals are Student's over the seeds; p is the exact sign-flip test over the seeds, with Holm's
correction over all groups that were looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.findings import in_brackets  # noqa: E402
from sftmix.common.errors import ConfigError, SFTMixError  # noqa: E402
from sftmix.common.files import MANIFEST, write_json  # noqa: E402
from sftmix.common.tables import read_dynamics, read_eval, read_split  # noqa: E402
from sftmix.compare.statistics import holm, interval_seeds, mean_sd, sign_flip  # noqa: E402
from sftmix.report.examples import FILE as EXAMPLES  # noqa: E402
from sftmix.types import Float64, Int64  # noqa: E402

QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


@dataclass(frozen=True)
class Losses:
    """The losses of the same N examples: ids, nll_sum f64[N] in nats, n_tokens i64[N] of the responses."""

    ids: Sequence[str]
    nll_sum: Float64
    n_tokens: Int64

    def of(self, ids: Sequence[str]) -> Losses:
        """Return the losses of these examples, in this order."""
        place = {example: k for k, example in enumerate(self.ids)}
        rows = [place[example] for example in ids]
        return Losses(ids, self.nll_sum[rows], self.n_tokens[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="directory of a table of compare")
    parser.add_argument("--ours", default="SFTMix", help="variant A of A - B")
    parser.add_argument("--theirs", default="NTP", help="variant B of A - B")
    parser.add_argument("--category", help="column of report/examples.parquet of the runs of A")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    try:
        found = by_example(options.table, options.ours, options.theirs, options.category)
    except SFTMixError as error:
        sys.exit(f"error: {error}")
    if options.out:
        write_json(options.out, found)
    print("\n".join(_lines(found)))


def by_example(table: Path, ours: str, theirs: str, category: str | None = None) -> dict[str, Any]:
    """Return the differences of each group of examples, with intervals over the seeds that both variants finished.

    Raises ConfigError where there is no such seed.
    """
    seeds = sorted(_seeds(table / ours) & _seeds(table / theirs))
    if not seeds:
        raise ConfigError(f"--table: {table} has no seed that both {ours} and {theirs} finished; name others")
    differences: dict[tuple[str, str, str], list[float]] = {}
    sizes: dict[tuple[str, str, str], int] = {}
    for seed in seeds:
        a, b = (table / variant / f"seed-{seed}" for variant in (ours, theirs))
        for rows in ("held-out", "training sample"):
            for key, members, off in _groups(a, b, rows, category):
                differences.setdefault((rows, *key), []).append(off)
                sizes[(rows, *key)] = members
    # A group that some seed lacks (a small sample) is left out: its seeds would not be those of the others.
    whole = {key: found for key, found in differences.items() if len(found) == len(seeds)}
    p_values = [sign_flip(found) for found in whole.values()]
    groups = []
    for (place, found), p, p_holm in zip(whole.items(), p_values, holm(p_values), strict=True):
        mean, sd = mean_sd(found)
        about = {**dict(zip(("rows", "by", "group"), place, strict=True)), "examples": sizes[place]}
        tests = {"differences": found, "interval": interval_seeds(found), "p": p, "p_holm": p_holm}
        groups.append({**about, "mean": mean, "sd": sd, **tests})
    return {"exploratory": True, "ours": ours, "theirs": theirs, "seeds": seeds, "groups": groups}


def _seeds(variant: Path) -> set[int]:
    found = (path.parent.parent.name for path in variant.glob(f"seed-*/train/{MANIFEST}"))
    return {int(name.removeprefix("seed-")) for name in found}


def _groups(ours: Path, theirs: Path, rows: str, category: str | None) -> Iterator[tuple[tuple[str, str], int, float]]:
    """Yield ((by, group), examples of it, difference in nats per token) of one seed."""
    read = _held_out if rows == "held-out" else _sample
    a = read(ours / "train")
    b, base = read(theirs / "train").of(a.ids), read(_base(ours, theirs)).of(a.ids)
    off = a.nll_sum - b.nll_sum
    confidence = -base.nll_sum / base.n_tokens
    for by, values, words in (
        ("confidence of the base model", confidence, ("least confident", *QUARTERS[1:3], "most confident")),
        ("response length", a.n_tokens, ("shortest", *QUARTERS[1:3], "longest")),
    ):
        # Equal values are ordered by id, so the quarters hold the same examples at every seed.
        ranked = sorted(range(len(a.ids)), key=lambda k, values=values: (values[k], a.ids[k]))  # type: ignore[misc]
        for word, members in zip(words, np.array_split(np.array(ranked), 4), strict=True):
            if len(members):
                yield (by, word), len(members), float(off[members].sum() / a.n_tokens[members].sum())
    for by, group_of in (("half of the split", _halves(ours, rows)), (category or "", _categories(ours, category))):
        for word in sorted({group_of[i] for i in a.ids if i in group_of}):
            members = np.array([k for k, i in enumerate(a.ids) if group_of.get(i) == word])
            yield (by, word), len(members), float(off[members].sum() / a.n_tokens[members].sum())


def _base(ours: Path, theirs: Path) -> Path:
    """Return the stage of the base model, which is the same for both arms."""
    return next(run / "base" for run in (ours, theirs) if (run / "base" / MANIFEST).exists())


def _held_out(stage: Path) -> Losses:
    ids, scores, _ = read_eval(stage / "eval.parquet")
    return Losses(ids, scores.nll_sum, scores.n_tokens)


def _sample(stage: Path) -> Losses:
    found = read_dynamics(stage / "sample.parquet")
    return Losses(found.ids, found.nll_sum[:, -1], found.n_tokens)


def _halves(run: Path, rows: str) -> Mapping[str, str]:
    """Return id -> confident or unconfident; held-out rows have no half."""
    path = run / "split" / "split.parquet"
    if rows == "held-out" or not path.exists():
        return {}
    ids, split = read_split(path)
    return {i: split.names[group] for i, group in zip(ids, split.group.tolist(), strict=True) if group >= 0}


def _categories(run: Path, column: str | None) -> Mapping[str, str]:
    """Return id -> value of a column of the run's table of examples. Raises ConfigError where there is none."""
    import pyarrow.parquet as pq

    if column is None:
        return {}
    path = run / EXAMPLES
    if not path.exists():
        raise ConfigError(f"--category: {path} is not there; `sftmix report {run} --map 0` writes it")
    names = pq.read_schema(path).names
    if column not in names:
        raise ConfigError(f"--category is {column}; columns of {path}: {', '.join(names)}")
    table = pq.read_table(path, columns=["id", column])
    values = zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True)
    return {i: str(value) for i, value in values if value is not None}


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the result as a Markdown table."""
    yield f"EXPLORATORY. {found['ours']} - {found['theirs']}, nats per token, {len(found['seeds'])} seeds."
    yield ""
    yield "| rows | by | group | examples | mean | 95% interval over seeds | p | p (Holm) |"
    yield "|---|---|---|---:|---:|---|---:|---:|"
    for each in found["groups"]:
        about = (each["rows"], each["by"], each["group"], str(each["examples"]), f"{each['mean']:+.4f}")
        yield (
            "| "
            + " | ".join((*about, in_brackets(each["interval"]), f"{each['p']:.4f}", f"{each['p_holm']:.4f}"))
            + " |"
        )


if __name__ == "__main__":
    main()
