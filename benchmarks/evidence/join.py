"""Make one table of parts that ran side by side, each at seeds of its own.

    python benchmarks/evidence/join.py --parts runs/evidence/pilot-rate-901 runs/evidence/pilot-rate-902 \\
      --table runs/evidence/pilot-rate

A table takes one process at a time, so several seeds run side by side in directories of their own. Each part must be
finished. Its runs become runs of the table by hard links, and `compare` then reads them back and writes the table,
which trains nothing. The parts stay as they are; delete them when the table is there. Call it from the directory where
the parts were made, since paths of rows and models are seen from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sftmix.common.errors import ConfigError, SFTMixError  # noqa: E402
from sftmix.common.files import read_json  # noqa: E402
from sftmix.config.layers import TABLE  # noqa: E402
from sftmix.pipeline.hold import Hold  # noqa: E402
from sftmix.tools.compare.cells import is_over  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, nargs="+", required=True, help="directories of finished tables")
    parser.add_argument("--table", type=Path, required=True, help="directory of the whole table")
    options = parser.parse_args()
    try:
        seeds = join(options.parts, options.table)
    except SFTMixError as error:
        sys.exit(f"error: {error}")
    sys.exit(compare("--config", options.parts[0] / TABLE, "--seeds", seeds, "--out", options.table))


def join(parts: Sequence[Path], table: Path) -> list[int]:
    """Link the runs of all parts into the directory of the table, and return the seeds of all parts.

    Raises ConfigError, before anything is written, for a part that is not finished, for parts that differ in more than
    their seeds or share a seed, and for a run that was begun in the table's own directory.
    """
    plans = {part: _plan(part) for part in parts}
    seeds = sorted(seed for plan in plans.values() for seed in plan["seeds"])
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ConfigError(f"--parts: seed {twice[0]} is in several of the parts; name parts of different seeds")
    first = next(iter(plans.values()))
    for part, plan in plans.items():
        differing = [key for key in first if key != "seeds" and plan.get(key) != first[key]]
        if differing:
            raise ConfigError(f"--parts: {part} and {parts[0]} differ in {differing[0]}; join parts of one table")
    with Hold(table):  # no other process may write the table meanwhile
        for part, plan in plans.items():
            link_runs(part, table, plan["variants"], plan["seeds"])
    return seeds


def _plan(part: Path) -> dict[str, Any]:
    """Return what compare.yaml of a finished part says."""
    file = part / "table.json"
    if not file.exists():
        raise ConfigError(f"--parts: {part} holds no table; run `sftmix compare ... --out {part}` to its end first")
    table = read_json(file)
    if not table["complete"]:
        done = f"{table['runs_done']} of {table['runs']} runs"
        raise ConfigError(f"--parts: {part} is not finished ({done}); run its command again, or wait for it")
    plan: dict[str, Any] = yaml.safe_load((part / TABLE).read_text(encoding="utf-8"))
    return plan


def link_runs(source: Path, target: Path, variants: Iterable[str], seeds: Sequence[int]) -> int:
    """Link the runs of these variants and seeds that are over into another table's directory; return their number.

    Runs that are over in the target already stay. A run appears there whole or not at all.
    """
    target.mkdir(parents=True, exist_ok=True)
    linked = 0
    for name in [f"{variant}/seed-{seed}" for variant in variants for seed in seeds]:
        if is_over(source / name) and not is_over(target / name):
            if (target / name).exists():
                raise ConfigError(f"{target / name} was begun there; finish it with `compare`, or move it away")
            _link_run(source / name, target / name)
            linked += 1
    if linked and not (target / TABLE).exists():  # compare takes no directory that no table wrote
        shutil.copyfile(source / TABLE, target / TABLE)
    return linked


def _link_run(source: Path, target: Path) -> None:
    """Link all files of a run. Nothing in a run directory is rewritten in place, so both stay as they are."""
    staging = target.with_name(f".joining-{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, copy_function=_link, ignore=shutil.ignore_patterns(".lock"))
    staging.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def compare(*words: object) -> int:
    """Run `sftmix compare` of the checkout that is the working directory, with one thread; return its exit code."""
    command = [sys.executable, "-m", "sftmix", "compare", *map(str, words)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    main()
