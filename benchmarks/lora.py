"""A training step with adapters against one of all weights: the same trainer, rows, order and pairs.

    python benchmarks/lora.py                     a random Llama of 110M parameters, LoRA of rank 16 on all-linear

Two training loops take turns, step by step, on the same batches of SFTMix. The memory of each is measured in a process
of its own: the peak of some steps above the loaded model's own memory (gradients, optimizer state, activations, and the
adapters themselves). Prints one JSON object and writes it to benchmarks/results/<date>-lora-<device>.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import held  # noqa: E402
from benchmarks.report import parser, publish, spread  # noqa: E402
from sftmix.batches.order import TrainingOrder  # noqa: E402
from sftmix.common.world import World  # noqa: E402
from sftmix.components.objectives import SFTMix  # noqa: E402
from sftmix.model.adapters import add_adapters, trained_numbers  # noqa: E402
from sftmix.options import CheckpointOptions, LoraOptions, TrainingOptions  # noqa: E402
from sftmix.testing import rows_in_memory  # noqa: E402
from sftmix.training.log import PeakMemory  # noqa: E402
from sftmix.training.loop import Stage, TrainingLoop  # noqa: E402

ARMS = ("full", "lora")


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """Return a random Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_loop(arm: str, model: PreTrainedModel, args: argparse.Namespace, directory: Path) -> TrainingLoop:
    if arm == "lora":
        add_adapters(model, LoraOptions(r=args.rank), seed=0)
    options = TrainingOptions(
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        precision=args.precision,
        max_steps=args.steps + 2,
        learning_rate=1e-4,
        activation_checkpointing=args.activation_checkpointing,
    )
    data = rows_in_memory([(args.prompt, args.response)] * 2 * args.global_batch_size)
    pairs = torch.arange(len(data)).view(2, -1).T.contiguous().numpy()
    stage = Stage(
        name=arm,
        model=model,
        data=data,
        order=TrainingOrder(len(data), lambda epoch: pairs, options=options, seed=0),
        objective=SFTMix(),
        options=options,
        checkpoint=CheckpointOptions(every=0),
        directory=directory,
        seed=0,
    )
    return TrainingLoop(stage, World(device=torch.device(args.device)))


def measure_time(args: argparse.Namespace, directory: Path) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of each step of both arms, in turns after two steps of warm-up, and their trained numbers."""
    loops = {arm: make_loop(arm, make_model(args), args, directory) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for step in range(args.steps + 2):
        for arm, loop in loops.items():
            start = time.perf_counter()
            loop.advance()
            if step >= 2:
                seconds[arm].append(time.perf_counter() - start)
    return seconds, {arm: trained_numbers(loop.module) for arm, loop in loops.items()}


def peak_memory(args: argparse.Namespace, directory: Path) -> float:
    """Return the MiB that two steps of this process's arm need at their peak, above the loaded model."""
    small = argparse.Namespace(**{**vars(args), "width": 64, "layers": 1, "vocabulary": 64})
    make_loop(args.memory_of, make_model(small), small, directory).advance()  # so that libraries make their buffers now
    model = make_model(args).to(args.device)
    before, peak = held(args.device), PeakMemory(torch.device(args.device))
    loop = make_loop(args.memory_of, model, args, directory)
    for _ in range(2):
        loop.advance()
    return (peak.bytes() - before) / 2**20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--vocabulary", type=int, default=32_000)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--prompt", type=int, default=48, help="tokens of each prompt")
    options.add_argument("--response", type=int, default=80, help="tokens of each response")
    options.add_argument("--global_batch_size", type=int, default=8)
    options.add_argument("--micro_batch_size", type=int, default=4)
    options.add_argument("--precision", default="fp32")
    options.add_argument("--activation_checkpointing", action="store_true")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        if args.memory_of:
            print(peak_memory(args, Path(directory)))
            return
        seconds, trained = measure_time(args, Path(directory))
    memory = {}
    for arm in ARMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", arm]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        memory[arm] = round(float(output.split()[-1]), 1)
    publish(
        "lora",
        args,
        {
            "trained_numbers": trained,
            "seconds_per_step": {arm: spread(values) for arm, values in seconds.items()},
            "lora / full seconds, step by step": spread(
                [b / a for a, b in zip(seconds["full"], seconds["lora"], strict=True)]
            ),
            "peak_mib_above_the_loaded_model": memory,
            "lora / full memory": round(memory["lora"] / memory["full"], 3),
        },
    )


if __name__ == "__main__":
    main()
