"""From the command to the first optimizer step, the first time and with the rows in the cache.

    python benchmarks/startup.py --model DIR --count 50000

Every start is a process of its own (`cli.py run` with a single step) on the same synthetic rows; the cache is a fresh
directory, filled by the first start. What reading and tokenising take alone is in scale.py.
"""

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
from benchmarks.stages import write_rows  # noqa: E402

SHARED = ROOT.parent / "shared"


def first_step(model: str, rows: Path, out: Path, environment: dict[str, str]) -> float:
    """Return the seconds from starting the command to the end of its first step."""
    command = [
        *(sys.executable, str(ROOT / "cli.py"), "run", "--model.path", model, "--data.train", str(rows)),
        *("--objective", "NTP", "--pairing", "null", "--out", str(out)),
        *("--training.max_steps", "1", "--training.global_batch_size", "8", "--checkpoint.every", "0"),
    ]
    start = time.time()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    step = json.loads((out / "train" / "metrics.jsonl").read_text().splitlines()[0])
    return round(float(step["time"]) - start, 2)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=str(SHARED / "models" / "base-7m"))
    options.add_argument("--count", type=int, default=50_000)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        write_rows(place / "rows.jsonl", args.count)
        environment = {**os.environ, "SFTMIX_CACHE": str(place / "cache"), "OMP_NUM_THREADS": str(args.threads)}
        first, *others = (
            first_step(args.model, place / "rows.jsonl", place / f"run{k}", environment) for k in range(4)
        )
    publish("startup", args, {"first time, seconds": first, "rows in the cache, seconds": sorted(others)})


if __name__ == "__main__":
    main()
