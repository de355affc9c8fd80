"""A check that two revisions compute the same numbers, bit for bit: the same commands run from both checkouts.

    python benchmarks/same_numbers.py --before REVISION                   every case, REVISION against this checkout
    python benchmarks/same_numbers.py --before REVISION --only ddp fsdp   some of them

The check compares the losses of every step, the dynamics, the confidence, the split, the held-out scores, the
weights, and their figures in summary.json and a table; it leaves out figures of clocks and machines and remarks in
words, and counts those that are new. Every case is a command line in a process of its own. A case that differs is
listed with the first values that do; then the exit code is 1. This is a check for a change that should change nothing,
and no benchmark: nothing is kept.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

MIXUP_IN_TWO = ["--objective", "DecomposedMixup"]
TEXT = ["--data.format", "text", "--data.columns", "{text: output}"]
CASES: dict[str, tuple[int, list[str]]] = {
    "one_process": (1, ["run", "--with_baseline", "--reference.token_nll", "true"]),
    "accumulation": (1, ["run", "--training.micro_batch_tokens", "300", "--training.length_groups", "2"]),
    "padding_free": (1, ["run", "--training.padding_free", "true"]),
    "decomposed": (1, ["run", *MIXUP_IN_TWO]),
    "rules": (1, ["run", "--objective", "DFT", "--pairing", "null", "--perturbation", "NEFTune"]),
    "lora": (1, ["run", "--model.lora.r", "4", "--with_baseline"]),
    "single_run": (1, ["run", "--reference", "Online", "--training.epochs", "3", "--with_baseline"]),
    "online": (1, ["run", "--reference.checkpoints", "online"]),
    "selected": (1, ["run", "--selector", "Longest", "--selector.k", "40", "--splitter", "Quantile"]),
    "documents": (1, ["run", *TEXT]),
    "documents_apart": (1, ["run", *TEXT, "--data.packing", "false"]),
    "ddp": (2, ["run", "--training.parallel", "ddp", "--with_baseline"]),
    "fsdp": (2, ["run", "--training.parallel", "fsdp", "--model.lora.r", "4"]),
    "fsdp_whole": (2, ["run", "--training.parallel", "fsdp", "--with_baseline"]),
    "compare": (1, ["compare", "--seeds", "[1,2]"]),
}
VARIANTS = "variants: {NTP: {objective: NTP}, SFTMix: {}, decomposed: {objective: DecomposedMixup}}\n"
CLOCKS = [
    "time",
    "tokens_per_second",
    "elapsed",
    "version",
    "git_revision",
    "versions",
    "trained_by",
    "notes",
    "remarks",
]
CLOCKS += ["configuration", "duplicates", "most_confident", "least_confident"]
"""Keys whose values may differ: of clocks, of machines, remarks in words, the hash of all options, new ones too, and
figures that were given up."""


def command(case: str, checkout: Path, out: Path, args: argparse.Namespace) -> list[str]:
    ranks, words = CASES[case]
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    if words[0] == "compare":
        table = out.parent / "table.yaml"
        table.write_text(VARIANTS)
        words = [*words, "--config", str(table)]
    # This learning rate lets every step move every weight: at the paper's, rounding would hide a difference.
    given = {
        "out": out,
        "model.path": args.model,
        "data.train": args.rows,
        "data.limit": args.limit,
        "data.max_length": 160,
        "data.eval_fraction": 0.2,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 4,
        "training.learning_rate": 1e-3,
        "training.epochs": 2,
        "training.precision": "fp32",
        "seed": 3,
    }
    if "--training.micro_batch_tokens" in words:
        given |= {"training.micro_batch_size": "null"}
    given = {key: value for key, value in given.items() if f"--{key}" not in words}
    return [*start, str(checkout / "cli.py"), *words, *(w for k, v in given.items() for w in (f"--{k}", str(v)))]


def numbers(case: str, checkout: Path, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers that one case computes in one checkout: name -> value, or the hash of many."""
    out = place / case / "run"
    out.parent.mkdir(parents=True)
    quiet = {"SFTMIX_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": str(checkout)}
    words = command(case, checkout, out, args)
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} in {checkout}: exit code {done.returncode}\n{' '.join(words)}\n{done.stderr[-3000:]}")
    return dict(_files(out))


def _files(out: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(p for p in out.rglob("*") if p.is_file() and "checkpoints" not in p.parts):
        name = str(path.relative_to(out))
        if path.name == "metrics.jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                yield from _leaves(values, f"{name} step {values['step']}")
        elif path.name in ("summary.json", "table.json", "calibration.json", "confounds.json"):
            yield from _leaves(json.loads(path.read_text(encoding="utf-8")), name)
        elif path.suffix == ".parquet":
            yield from _columns(path, name)
        elif path.suffix == ".safetensors":
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def _columns(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    for column in table.column_names:
        yield f"{name} {column}", hashlib.sha256(repr(table[column].to_pylist()).encode()).hexdigest()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if set(CLOCKS).isdisjoint(key.split(".")) and not key.endswith(("seconds", "_bytes")):
                yield from _leaves(inner, f"{name} {key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{name} {place}")
    else:
        yield name, value


def compared(case: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Print one line, and below it the values that differ."""
    missing = object()
    wrong = [n for n in before if repr(before[n]) != repr(after.get(n, missing))]
    new = [n for n in after if n not in before]
    more = f"; {len(new):,} new, such as {new[0]}" if new else ""
    print(f"{case}: {'DIFFERS' if wrong else 'the same'} ({len(before):,} values and hashes{more})", flush=True)
    for name in wrong[:8]:
        print(f"    {name}: {before.get(name, '(not there)')} -> {after.get(name, '(not there)')}", flush=True)
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a revision")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--rows", default=str(SHARED / "data" / "alpaca" / "alpaca_8k.json"))
    parser.add_argument("--limit", type=int, default=61, help="rows, of which a fifth is held out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        checkout = Path(place) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), args.before], check=True)
        sides = {"before": checkout, "after": ROOT}
        try:
            with ThreadPoolExecutor(2) as pool:
                same = []
                for case in args.only:
                    found = pool.map(lambda s, c=case: numbers(c, sides[s], Path(place) / f"{s}-runs", args), sides)
                    same.append(compared(case, *found))
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
