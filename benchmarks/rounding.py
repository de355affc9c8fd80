"""What the rounding of an export takes from a training: the held-out NLL of one trained model, rounded in several ways.

    python benchmarks/rounding.py --model DIR --rows FILE --out DIR [--rate 2e-6] [--lora 8] [--dtype bfloat16] ...

The model is trained by `run` and exported in float32, a model with adapters merged. Then its weights are rounded in
place as an export does it, to nearest and by stochastic rounding at three seeds, and the held-out rows are scored in
float32 each time. A line of the table is printed: NLL per token before, of the float32 weights, and rounded; and the
share of the weights that equal the base model's when rounded to nearest.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sftmix  # noqa: E402
from sftmix.config.read import from_dict  # noqa: E402
from sftmix.model.load import load_model  # noqa: E402
from sftmix.model.rounding import round_in_place  # noqa: E402
from sftmix.pipeline.loaded import scoring_model  # noqa: E402
from sftmix.ranks.world import World  # noqa: E402
from sftmix.tools.runs.export import export_run  # noqa: E402
from sftmix.tools.runs.rows import rows_of_run  # noqa: E402
from sftmix.training.checkpoint import own_weights  # noqa: E402
from sftmix.training.scoring import held_out_metrics  # noqa: E402

SEEDS = (0, 1, 2)


def trained(options: argparse.Namespace) -> tuple[Path, Path, float]:
    """Train; return the run, the directory of its float32 weights, and the held-out NLL of the base model."""
    run = Path(options.out)
    tree = {
        "model": {"path": options.model, "dtype": "float32", "lora": {"r": options.lora}},
        "data": {"train": options.rows, "eval_fraction": options.held_out / options.count},
        "objective": "NTP",
        "pairing": None,
        "training": {"learning_rate": options.rate, "epochs": options.epochs, "global_batch_size": options.batch},
        "out": str(run),
    }
    before = sftmix.run(from_dict(tree))["eval_nll_before"]
    model = run / "train" / "model"
    if options.lora:
        model = run / "merged"
        if not model.exists():
            export_run(run, model, merge=True, dtype="float32")
    return run, model, before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=360, help="rows of the file, the held-out ones included")
    parser.add_argument("--held_out", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rate", type=float, default=2e-6)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    run, model, before = trained(options)
    config, rows = rows_of_run(run)
    assert rows.data.eval is not None

    base, dtype = load_model(options.model).state_dict(), getattr(torch, options.dtype)
    figures, unmoved = [before], 0.0
    for rounding, seed in ((None, 0), ("nearest", 0), *(("stochastic", seed) for seed in SEEDS)):
        scorer, module = scoring_model(config, World(), str(model), rows.encoder, name="rounded", packed=rows.packed)
        if rounding is not None:
            weights = own_weights(module)
            round_in_place(weights, dtype, rounding=rounding, seed=seed)
            if rounding == "nearest":
                same = sum(int((x == base[name].to(dtype)).sum()) for name, x in weights.items())
                unmoved = same / sum(x.numel() for x in weights.values())
        figures.append(held_out_metrics(scorer(module, rows.data.eval))["eval_nll"])
    name, rate = Path(options.model).name, f"{'LoRA ' * bool(options.lora)}{options.rate:g}"
    print(f"| {name} | {rate} | {' | '.join(f'{nll:.4f}' for nll in figures)} | {unmoved:.0%} |")


if __name__ == "__main__":
    main()
