"""FSDP on one rank under torchrun: a run, one that is killed and continued, their losses, verify and export.

    python benchmarks/one_rank.py --model DIR --rows FILE --device cuda

Both runs add in one order (training.deterministic). The second gets SIGKILL, with its launcher, once it has a
checkpoint. Reports steps, losses that differ, the last line of `sftmix verify`, the bytes of the export, and seconds.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import parse, parser, publish  # noqa: E402
from sftmix.disk.files import MANIFEST, read_steps  # noqa: E402

QUICK = {"steps": 6, "every": 2, "limit": 24, "max_length": 48, "global_batch_size": 4}
LAUNCH = ("torch.distributed.run", "--standalone", "--nproc_per_node", "1")
LOSSES = ("loss", "grad_norm")


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        command = [sys.executable, "-m", *words]
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def done(words: list[str], log: Path) -> float:
    """Run a command to its end; return its seconds. Exits with the end of its output if it fails."""
    began, code = time.monotonic(), start(words, log).wait()
    if code:
        sys.exit(f"exit code {code}: {' '.join(words)}\n{log.read_text(errors='replace')[-4000:]}")
    return time.monotonic() - began


def killed(words: list[str], log: Path, run: Path) -> int:
    """Kill a command, its launcher first, once its run has a checkpoint; return the last step that it logged."""
    process = start(words, log)
    while process.poll() is None and not list(run.glob(f"train/checkpoints/step-*/{MANIFEST}")):
        time.sleep(0.05)
    ranks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    for pid in (process.pid, *map(int, ranks.stdout.split())):  # torchrun gives its ranks sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return max((one["step"] for one in read_steps(run / "train")), default=0)


def commands(args: Namespace, place: Path) -> dict[str, list[str]]:
    options = {
        "model.path": args.model,
        "data.train": args.rows,
        "data.limit": args.limit,
        "data.max_length": args.max_length,
        "objective": "NTP",
        "pairing": "null",
        "training.parallel": "fsdp",
        "training.deterministic": "true",
        "training.max_steps": args.steps,
        "training.global_batch_size": args.global_batch_size,
        "checkpoint.every": args.every,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    train = [*LAUNCH, "-m", "sftmix", "run", *words, "--out"]
    runs = [str(place / name) for name in ("whole", "killed")]
    return {
        **{Path(run).name: [*train, run] for run in runs},
        "verify": [*LAUNCH, "-m", "sftmix", "verify", runs[1]],
        "export": ["sftmix", "export", runs[1], "--to", str(place / "exported")],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--rows", required=True)
    options.add_argument("--limit", type=int, default=512)
    options.add_argument("--max_length", type=int, default=512)
    options.add_argument("--global_batch_size", type=int, default=32)
    options.add_argument("--steps", type=int, default=24)
    options.add_argument("--every", type=int, default=6, help="steps between two checkpoints")
    args = parse(options, QUICK)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        log, run = place / "output.txt", place / "killed"
        words = commands(args, place)
        seconds = {"whole": done(words["whole"], log)}
        step = killed(words["killed"], log, run)
        seconds |= {name: done(words[name], log) for name in ("killed", "verify", "export")}
        steps = [read_steps(place / name / "train") for name in ("whole", "killed")]
        moved = [a["step"] for a, b in zip(*steps, strict=True) if any(a[name] != b[name] for name in LOSSES)]
        said = next(line for line in reversed(log.read_text().splitlines()) if " replayed: " in line)
        size = sum(file.stat().st_size for file in (place / "exported").glob("*.safetensors"))
    results = {"killed after step": step, "steps": len(steps[0]), "steps whose losses differ": moved, "verify": said}
    publish("one_rank", args, {**results, "bytes of the export": size, "seconds": seconds})


if __name__ == "__main__":
    main()
