"""The runs of preregistration-regularises.md on one GPU of a machine that can fetch nothing, in many processes.

Here, the weights are cut into parts that travel one a call; there, each call adds its part, and the last one runs:

    python benchmarks/evidence/regularises/gpu.py split runs/real/smollm2-135m runs/parts           here
    python benchmarks/evidence/regularises/gpu.py join runs/parts/part-0 /tmp/smollm2-135m          there, for each part
    python benchmarks/evidence/regularises/gpu.py run --model /tmp/smollm2-135m --out /tmp/kept --minutes 8 --tar FILE

`run` makes the pilot, deals the seeds to processes in the order of their blocks, stops them when the minutes are over,
and packs what is kept, begun runs left out, into FILE. It goes on from what OUT holds: copy what is in the repository
there first, unpacked (../packed.py), if a part of the study is done. The rows (rows.py) travel as
runs/regularises/data. With --tiny a CPU rehearses it: `run --tiny --out DIR --tar FILE`.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.regularises.rows import SEEDS  # noqa: E402
from benchmarks.real_models import MODELS  # noqa: E402

PART = 60 * 2**20
WEIGHTS = "model.safetensors"


def split(model: Path, to: Path) -> None:
    """Cut the weights of a model into part-0, part-1, ...; the first one also has the model's other files."""
    to.mkdir(parents=True, exist_ok=True)
    with (model / WEIGHTS).open("rb") as file:
        for number, block in enumerate(iter(lambda: file.read(PART), b"")):
            (to / f"part-{number}").mkdir()
            (to / f"part-{number}" / WEIGHTS).write_bytes(block)
    for file_ in model.iterdir():
        if file_.name != WEIGHTS:
            shutil.copy(file_, to / "part-0")


def join(part: Path, model: Path) -> None:
    """Add a part to a model, and print the digest so far: after the last part it is that of the study's weights."""
    model.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        with (model / file.name).open("ab" if file.name == WEIGHTS else "wb") as to:
            to.write(file.read_bytes())
    digest = hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    print(digest, "whole" if digest == MODELS["smollm2-135m"].weights else "not whole yet")


def run(options: argparse.Namespace) -> None:
    """Run the pilot and then the seeds in processes of their own, until all are done or the minutes are over."""
    end = time.monotonic() + 60 * options.minutes
    words = [sys.executable, str(Path(__file__).with_name("run.py")), "--out", str(options.out)]
    words += ["--work", str(options.work)]
    words += ["--tiny"] if options.tiny else ["--model.path", str(options.model), "--checkpoint.every", "0"]
    seeds = [list(SEEDS[start :: options.processes]) for start in range(options.processes)]
    wait([started(words, [])], end)
    wait([started(words, mine) for mine in seeds if mine], end)
    with tarfile.open(options.tar, "w") as kept:
        kept.add(options.out, "regularises")
    print(f"{len(list(options.out.glob('runs/*.json')))} runs in {options.tar}")


def started(words: Sequence[str], seeds: Sequence[int]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*words, "--seeds", *map(str, seeds)], cwd=ROOT, env=environment)


def wait(processes: Sequence[subprocess.Popen[bytes]], end: float) -> None:
    """Wait for processes, and stop those that are left when the time is over."""
    while any(each.poll() is None for each in processes):
        if time.monotonic() > end:
            for each in processes:
                each.kill()
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("split", ("model", "to")), ("join", ("part", "model"))):
        command = commands.add_parser(name)
        for word in words:
            command.add_argument(word, type=Path)
    command = commands.add_parser("run")
    command.add_argument("--model", type=Path, help="of the real weights")
    command.add_argument("--work", type=Path, default=Path("runs/regularises"))
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--tar", type=Path, required=True)
    command.add_argument("--minutes", type=float, default=9.0)
    command.add_argument("--processes", type=int, default=8)
    command.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.command == "split":
        split(options.model, options.to)
    elif options.command == "join":
        join(options.part, options.model)
    else:
        run(options)


if __name__ == "__main__":
    main()
