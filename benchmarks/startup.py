"""From the command to the first optimizer step, and loading alone, the first time and from the cache.

    python benchmarks/startup.py --model DIR --rows FILE FILE --count 50000

Rows are repeated, each time with a word of their own, until there are --count of them. Every start is a process of its
own (`cli.py run` with a single step); the cache is a fresh directory, filled by the first start.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import parser, publish  # noqa: E402

SHARED = ROOT.parent / "shared"
LOAD = """
import resource, sys, time
start = time.perf_counter()
from sftmix.data import load_data, make_encoder
from sftmix.model.load import load_tokenizer
from sftmix.options import DataOptions
encoder = make_encoder(load_tokenizer(sys.argv[1]))
imported, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = load_data(DataOptions(train=[sys.argv[2]]), encoder, max_length=int(sys.argv[3]), seed=0, progress=False).train
tokens = int(data.lengths.sum())
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
print(round(time.perf_counter() - imported, 2), tokens, round(grown / 1024, 1))
"""


def write_rows(path: Path, sources: list[str], count: int) -> None:
    rows: list[dict] = []
    for source in sources:
        text = Path(source).read_text(encoding="utf-8")
        rows += json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    rows = [r for r in rows if r["output"].strip()]
    with path.open("w", encoding="utf-8") as out:
        for k, row in zip(range(count), itertools.cycle(rows), strict=False):
            own = {**{f: row[f] for f in ("instruction", "input", "output")}, "id": f"row{k}"}
            out.write(json.dumps(own) + "\n")


def load(model: str, rows: Path, length: int, environment: dict[str, str]) -> dict[str, float]:
    """Return the seconds from rows to tokenised data set (without imports), and the MiB by which the peak grew."""
    command = [sys.executable, "-c", LOAD, model, str(rows), str(length)]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, tokens, grown = done.stdout.split()[-3:]
    return {"seconds": float(seconds), "tokens": int(tokens), "peak_growth_mib": float(grown)}


def first_step(model: str, rows: Path, length: int, out: Path, environment: dict[str, str]) -> float:
    """Return the seconds from starting the command to the end of its first step."""
    command = [
        *(sys.executable, str(ROOT / "cli.py"), "run", "--model.path", model, "--data.train", str(rows)),
        *("--data.max_length", str(length), "--objective", "NTP", "--pairing", "null", "--out", str(out)),
        *("--training.max_steps", "1", "--training.global_batch_size", "8", "--checkpoint.every", "0"),
    ]
    start = time.time()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return float(json.loads((out / "train" / "metrics.jsonl").read_text().splitlines()[0])["time"]) - start


def main() -> None:
    options = parser(__doc__)
    alpaca = SHARED / "data" / "alpaca"
    options.add_argument("--model", default=str(SHARED / "models" / "base-7m"))
    options.add_argument(
        "--rows", nargs="+", default=[str(alpaca / "alpaca_8k.json"), str(alpaca / "alpaca_17k.jsonl")]
    )
    options.add_argument("--count", type=int, default=50_000)
    options.add_argument("--max_length", type=int, default=1024)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        rows = directory / "rows.jsonl"
        write_rows(rows, args.rows, args.count)
        environment = {**os.environ, "SFTMIX_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": str(args.threads)}
        loads = [load(args.model, rows, args.max_length, environment) for _ in range(2)]
        steps = [first_step(args.model, rows, args.max_length, directory / f"run{k}", environment) for k in range(3)]
    results = {
        "load, first time": loads[0],
        "load, cached": loads[1],
        "start to first step, cached, seconds": [round(seconds, 2) for seconds in sorted(steps)],
    }
    publish("startup", args, results)


if __name__ == "__main__":
    main()
