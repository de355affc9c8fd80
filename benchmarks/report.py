"""The report that every benchmark prints and keeps: date, commit, device, versions, setting, results."""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--out", type=Path, default=RESULTS, help="directory of the dated result")
    return made


def parse(options: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """Return the arguments; with --quick those of a small trial, which `publish` prints and does not keep."""
    options.add_argument("--quick", action="store_true", help=f"a trial of a few minutes, not kept: {dict(quick)}")
    if "--quick" in sys.argv[1:]:
        options.set_defaults(**quick)
    return options.parse_args()


def publish(
    name: str, args: argparse.Namespace, results: Mapping[str, Any], *, variant: str = "", packages: Sequence[str] = ()
) -> None:
    """Print one JSON object and write it to <out>/<date>-<name>[-<variant>]-<device>.json.

    variant   tells settings of one benchmark apart that are kept side by side
    packages  packages whose versions are noted, beside python's and torch's
    """
    hidden = ("out", "device", "memory_of", "quick")
    report = {
        "benchmark": name,
        **({"variant": variant} if variant else {}),
        "command": " ".join(["python", f"benchmarks/{name}.py", *(shlex.quote(str(_shown(w))) for w in _typed())]),
        **about(args.device, packages),
        "setting": {k: _shown(v) for k, v in vars(args).items() if k not in hidden},
        **results,
    }
    print(json.dumps(report))
    if getattr(args, "quick", False):
        return
    args.out.mkdir(parents=True, exist_ok=True)
    label = f"{name}-{variant}" if variant else name
    (args.out / f"{report['date']}-{label}-{args.device}.json").write_text(json.dumps(report, indent=1) + "\n")


def about(device: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a figure depends on: date, commit, device, load, versions."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]  # +: with other changes
    commit = subprocess.run(describe, capture_output=True, text=True)
    cuda = device == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{p: version(p) for p in packages},
        },
    }


def _typed() -> list[str]:
    """Return the words of the command line, without the place of the result."""
    words = sys.argv[1:]
    place = words.index("--out") if "--out" in words else len(words)
    return [*words[:place], *words[place + 2 :]]


def _shown(value: Any) -> Any:
    """Return a setting; files by their place beside the checkout, not by the place of the checkout."""
    if isinstance(value, (list, tuple)):
        return [_shown(v) for v in value]
    beside = isinstance(value, (str, Path)) and str(value).startswith(f"{ROOT.parent}/")
    return str(Path(value).relative_to(ROOT.parent)) if beside else value


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the median, the quartiles, and the number of values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": round(middle, digits), "q1": round(low, digits), "q3": round(high, digits), "n": len(values)}
