"""Steps in a stretch of time, by how OpenMP's threads are started and wait, on a CPU that other programs use.

    python benchmarks/busy_cpu.py                                the quickstart's model and rows
    python benchmarks/busy_cpu.py --model DIR --rows FILE        a directory of real_models.py

All settings start at once and then take turns: one of them runs for `--turn` seconds while the others are stopped, so
that the load of other programs is the same for all. First the machine is as it is; then `--busy` programs that only
count are started beside. A model that is given has adapters: four whole ones would not fit the memory, and its products
are as large.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import parse, parser, publish  # noqa: E402
from sftmix.tools.quickstart import materialise  # noqa: E402

SETTINGS = {
    "as it comes": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
QUICK = {"seconds": 4.0, "turn": 2.0}
LARGE = ["--training.global_batch_size", "2", "--data.max_length", "64", "--model.lora.r", "8"]
SMALL = ["--training.global_batch_size", "32", "--data.max_length", "64"]


@contextmanager
def started(
    commands: Mapping[str, Sequence[str]], environments: Mapping[str, Mapping[str, str]]
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Yield the processes of some commands, which are killed afterwards."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    children = {}
    try:
        for name, command in commands.items():
            given = {**inherited, **environments.get(name, {})}
            children[name] = subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL)
        yield children
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def steps(out: Path) -> int:
    log = out / "train" / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def counted(
    children: Mapping[str, subprocess.Popen[bytes]], place: Path, seconds: float, turn: float
) -> dict[str, int]:
    """Let stopped children run in turns, each for `seconds`; return the steps that they made."""
    made = Counter[str]()
    for _ in range(round(seconds / turn)):
        for name, child in children.items():
            before = steps(place / name)
            child.send_signal(signal.SIGCONT)
            time.sleep(turn)
            child.send_signal(signal.SIGSTOP)
            made[name] += steps(place / name) - before
            if child.poll() is not None:
                raise SystemExit(f"{name}: it has ended")
    return dict(made)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="default: the quickstart's")
    options.add_argument("--rows", default=str(ROOT.parent / "shared" / "data" / "alpaca" / "alpaca_8k.json"))
    options.add_argument("--seconds", type=float, default=45.0)
    options.add_argument("--turn", type=float, default=5.0)
    options.add_argument("--busy", type=int, default=4)
    args = parse(options, QUICK)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        made = materialise(place / "made", seed=0)
        model, rows, words = (args.model, args.rows, LARGE) if args.model else (made.model, made.train, SMALL)
        common = ["--model.path", str(model), "--data.train", str(rows), "--objective", "NTP", "--pairing", "null"]
        common += ["--training.epochs", "1000", "--checkpoint.every", "0", "--training.precision", "fp32", *words]
        runs = {
            name: [sys.executable, str(ROOT / "cli.py"), "run", *common, "--out", str(place / name)]
            for name in SETTINGS
        }
        results = {}
        with started(runs, SETTINGS) as children:
            waiting = dict(children)
            while waiting:
                time.sleep(0.2)
                for name in [name for name in waiting if steps(place / name) > 1]:
                    waiting.pop(name).send_signal(signal.SIGSTOP)
                if any(child.poll() is not None for child in children.values()):
                    raise SystemExit("a run has ended before its second step")
            for busy in (0, args.busy):
                counting = {f"busy {k}": [sys.executable, "-c", "while True: pass"] for k in range(busy)}
                with started(counting, {}):
                    found = counted(children, place, args.seconds, args.turn)
                results[f"steps in {args.seconds:g} s beside {busy} busy programs"] = found | {
                    "load_average": round(os.getloadavg()[0], 1)
                }
    publish("busy_cpu", args, results, variant=Path(args.model).name if args.model else "quickstart")


if __name__ == "__main__":
    main()
