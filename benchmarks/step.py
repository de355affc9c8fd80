"""A training step with Mixup against one without: same trainer, rows, order and global batch.

    python benchmarks/step.py --model DIR --rows FILE

Two training loops take turns, step by step, on the same batches: NTP paired as SFTMix pairs (so in the same order) and
SFTMix. Reports seconds per step, their ratio step by step, real tokens per second, and the share of padded slots that
hold a real token, also without length groups. Then scoring against training, in tokens per second.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import parser, publish, spread  # noqa: E402
from benchmarks.stages import load_rows, ntp_stage  # noqa: E402
from sftmix.components.objectives import SFTMix  # noqa: E402
from sftmix.data.batching import collate, micro_steps  # noqa: E402
from sftmix.models import load_model  # noqa: E402
from sftmix.options import TrainingOptions  # noqa: E402
from sftmix.training.distributed import World  # noqa: E402
from sftmix.training.loop import TrainingLoop  # noqa: E402
from sftmix.training.stage import Stage  # noqa: E402
from sftmix.training.window import default_length_groups  # noqa: E402

SHARED = ROOT.parent / "shared"


def alternate(loops: dict[str, TrainingLoop], steps: int) -> dict[str, list[dict]]:
    """Advance the loops in turns; two steps of warm-up are left out."""
    seen: dict[str, list[dict]] = {name: [] for name in loops}
    for step in range(steps + 2):
        for name, loop in loops.items():
            start = time.perf_counter()
            metrics, _ = loop.advance()
            if step >= 2:
                seen[name].append({**metrics, "seconds": time.perf_counter() - start})
    return seen


def fill(stage: Stage, micro: int, segments: int) -> float:
    """Share of the padded slots of the stage's batches that hold a real token."""
    real = padded = 0
    for step in range(min(40, stage.order.total_steps)):
        units = stage.order.batch(step)
        steps = micro_steps(units, stage.data.lengths, world_size=1, micro_batch_size=micro, max_segments=segments)
        for each in steps:
            batch = collate(each.ranks[0], stage.data, n_segments=each.n_segments)
            real += sum(int(s.attention_mask.sum()) for s in batch.segments)
            padded += sum(s.attention_mask.numel() for s in batch.segments)
    return round(real / padded, 4)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=str(SHARED / "models" / "base-7m"))
    options.add_argument("--rows", default=str(SHARED / "data" / "alpaca" / "alpaca_8k.json"))
    options.add_argument("--limit", type=int, default=1600)
    options.add_argument("--max_length", type=int, default=512)
    options.add_argument("--global_batch_size", type=int, default=32)
    options.add_argument("--micro_batch_size", type=int, default=16)
    options.add_argument("--precision", default="fp32")
    options.add_argument("--steps", type=int, default=12)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    world = World(device=torch.device(args.device))
    data = load_rows(args.model, args.rows, limit=args.limit, max_length=args.max_length)
    training = TrainingOptions(
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        precision=args.precision,
        max_steps=args.steps + 2,
        learning_rate=1e-4,
    )
    with tempfile.TemporaryDirectory() as directory:
        ntp = ntp_stage(load_model(args.model), data, training, world, Path(directory))
        mixed = replace(ntp, name="sftmix", model=load_model(args.model), objective=SFTMix())
        seen = alternate({"ntp": TrainingLoop(ntp, world), "sftmix": TrainingLoop(mixed, world)}, args.steps)
        scoring = TrainingLoop(replace(ntp, model=load_model(args.model)), world)
        start = time.perf_counter()
        scoring._score()
        scored = int(data.lengths.sum()) / (time.perf_counter() - start)

    seconds = {name: [m["seconds"] for m in rows] for name, rows in seen.items()}
    trained = {name: sum(m["tokens"] for m in seen[name]) / sum(seconds[name]) for name in seen}
    groups = default_length_groups(args.micro_batch_size, world.device)
    publish(
        "step",
        args,
        {
            "seconds_per_step": {name: spread(values) for name, values in seconds.items()},
            "sftmix / ntp, step by step": spread(
                [b / a for a, b in zip(seconds["ntp"], seconds["sftmix"], strict=True)]
            ),
            "real_tokens_per_second": {name: round(value, 1) for name, value in trained.items()},
            "scoring_tokens_per_second": round(scored, 1),
            "scoring / training tokens per second": round(scored / trained["ntp"], 3),
            "real tokens / slots": {
                f"{groups} length groups": fill(ntp, args.micro_batch_size, groups),
                "one group": fill(ntp, args.micro_batch_size, 1),
            },
        },
    )


if __name__ == "__main__":
    main()
