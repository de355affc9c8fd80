"""What has hardly been run on a GPU, in one command: tests, loss, steps, a run, TRL beside it, the estimate of memory.

    python -m benchmarks.first_gpu_hour --minutes 60       parts that have a result are skipped: call it again to go on
    python -m benchmarks.first_gpu_hour --minutes 9.5      of a loan of 15 minutes; a second call has --minutes 3.5
    python -m benchmarks.first_gpu_hour --tiny             a rehearsal on a CPU, of some minutes

Needs one GPU, torch, the package and what it depends on; for the first part the packages of `sftmix[test]`, and TRL
for its own. Nothing is downloaded: weights and rows are random. Each part is a process of its own, which starts if its
minutes are left and is stopped when all are over: one that crashes or runs out of memory is noted with the end of its
output, and tried again by the next call. Writes <date>-<part>-<device>.json for each part, and issue.md: what was
measured, beside public figures.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import RESULTS, about  # noqa: E402
from benchmarks.stages import WORDS, random_llama, write_rows  # noqa: E402
from sftmix.tools.quickstart import make_tokenizer  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocabulary": 32_000, "hidden_size": 1024, "num_hidden_layers": 16},
    "1b": {"vocabulary": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192},
    "3b": {"vocabulary": 128_256, "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192},
}
SHAPES["1b"] |= {"num_key_value_heads": 8}
SHAPES["3b"] |= {"num_attention_heads": 24, "num_key_value_heads": 8}

LOSS = "loss --dtype bfloat16 --rows 8192 --rounds 20"
STEP = "step --rows {0}/long.jsonl --random --precision bf16 --limit 64 --max_length 2048 --global_batch_size 16 "
STEP += "--micro_batch_size 4 --steps 20 --warm_up 4 --layouts "
OWN = "step --random --precision bf16 --total 4875 --steps 20 --warm_up 8 --model {0}/1b --layouts defaults "
OWN += "'defaults, deterministic'"
"""Nothing of the layout is set; three epochs of Alpaca have so many steps, by which compile auto decides."""
SHORT = "--rows {0}/rows.jsonl --limit 1000 --max_length 512 --global_batch_size 32"
OURS = "--data.train {0}/rows.jsonl --data.limit 512 --data.max_length 512 --data.eval_fraction 0.1 --out {0}/run "
LORA = f"step --random --precision bf16 --steps 8 --warm_up 2 --model {{0}}/3b {SHORT} --layouts 'LoRA, base "


class Part(NamedTuple):
    """Minutes that it takes at most on an H100, about, and its words, with the place of models and rows for {0}."""

    minutes: float
    words: str


PARTS = {
    "defaults-alpaca": Part(2, f"{OWN} {SHORT}"),
    "defaults-2048": Part(
        2,
        f"{OWN} --rows {{0}}/long.jsonl --limit 64 --max_length 2048 --global_batch_size 16",
    ),
    "trl": Part(
        3,
        "trl_compare --model {0}/small --rows {0}/rows.jsonl --precision bf16 --limit 960 --epochs 1 "
        "--contestants trl_default trl_grouped trl_liger ours_ntp ours_sftmix",
    ),
    "loss-4096x151936": Part(1, f"{LOSS} --head 4096x151936"),
    "tests": Part(1, "pytest -o addopts= --import-mode=importlib -m gpu -q -rfEs --tb=short"),
    "one-rank": Part(3, "one_rank --model {0}/small --rows {0}/rows.jsonl"),
    "lora-bfloat16": Part(1, f"{LORA}bfloat16'"),
    "lora-float32": Part(1, f"{LORA}float32'"),
    "loss-4096x128256": Part(1, f"{LOSS} --head llama-3.1-8b"),
    "run": Part(
        3,
        f"run {OURS} --model.path {{0}}/small --training.epochs 2 --reference.checkpoints 2 --checkpoint.every 10",
    ),
    "estimate": Part(
        3,
        "estimate --source {0}/small --rows {0}/rows.jsonl --hidden_size 1024 --layers 16 "
        "--settings 'as it is' 'recomputed activations' LoRA",
    ),
    "step-1b": Part(3, f"{STEP} padded --model {{0}}/1b"),
    "step-1b-compiled": Part(3, f"{STEP} 'length groups, compiled' --model {{0}}/1b"),
    "step-3b": Part(4, f"{STEP} padded --model {{0}}/3b --activation_checkpointing"),
    "loss-2048x248320": Part(2, f"{LOSS} --head 2048x248320 --rows 16384 --rounds 10"),
    "step-small": Part(2, f"{STEP} padded --model {{0}}/small"),
}
"""The parts in the order of their worth; the first eight, which are the main ones, take 14 minutes.

The first five take 9 minutes: a call of 9.5 has them. A second call of 3.5 has the sixth, a checkpoint on one rank."""
TINY = {
    "loss": "--quick --head smollm2-135m --rows 8 --rounds 2 --dtype float32",
    "step": "--quick --limit 16 --max_length 48 --global_batch_size 4 --micro_batch_size 2 --steps 2 --warm_up 1",
    "run": "--data.limit 24 --data.max_length 48",
    "one_rank": "--quick",
    "trl_compare": "--quick --limit 32 --held_out 8 --max_length 48",
    "estimate": "--quick --limit 32 --max_length 48 --hidden_size 128 --layers 2 --steps 2 --settings 'as it is'",
}
PUBLIC = {
    "loss-4096x151936": "trl #7244, H100: matmuls 42 ms; naive 59 ms, 19.9 GiB; chunked_nll 167 ms, 13.1 GiB; Liger "
    "192 ms, 6.1 GiB",
    "loss-4096x128256": "Liger-Kernel #1339, B200: 17.5 ms, 2.4 GiB, 65% of the peak; #1356, Hopper, V 131,072, "
    "backward alone: 763 TFLOP/s, 3.9 GiB",
    "loss-2048x248320": "trl #6858: CCE 92.6 ms, 3.1 GB; Liger 321 ms",
    "step-1b": "trl #6859, Llama-3.2-1B: a step with CCE 1.33x as fast as without",
    "step-1b-compiled": "torchtitan llama3_h100 2024-12, 8B, H100: 5,762 tokens/s, compiled 6,667",
    "step-3b": "KempnerForge mfu_scaling 2026-04-05, 8B, H200, length 4,096, recomputed, compiled: 10,471 tokens/s, "
    "57.8% of 989 TFLOP/s",
}
"""Public figures of the same or the nearest shapes, with their sources."""


def make_inputs(place: Path, *, tiny: bool) -> None:
    """Write the tokenizer, the models (weights of the small one alone) and rows: 2,100 words, Alpaca's lengths."""
    source = str(place / "tokenizer")
    make_tokenizer([WORDS]).save_pretrained(source)
    LlamaConfig(max_position_embeddings=4096).save_pretrained(source)
    for name, shape in SHAPES.items():
        if tiny:
            shape = {"vocabulary": 1000, "hidden_size": 128, "num_hidden_layers": 2}
        random_llama(source, place / name, weights=name == "small", **shape)
    write_rows(place / "long.jsonl", 64, shortest=2100, longest=2100)
    write_rows(place / "rows.jsonl", 1120, alpaca=True)


def command(name: str, place: Path, device: str) -> list[str]:
    program, *words = shlex.split(PARTS[name].words.format(place))
    if device == "cpu":
        words += shlex.split(TINY.get(program, ""))
    if program == "pytest":
        files = (path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
        return [sys.executable, "-m", "pytest", *words, *map(str, files)]
    if program == "run":  # and some of its steps a second time
        recipe = shlex.join([sys.executable, str(ROOT / "cli.py")])
        verify = f"{recipe} verify {shlex.quote(str(place / 'run'))}; echo exit code $?"
        return ["sh", "-c", f"{recipe} run {shlex.join(words)} && {{ {verify}; }}"]
    script = ROOT / "benchmarks" / f"{program}.py"
    return [sys.executable, str(script), *words, "--device", device, "--out", str(place / "results")]


def attempt(name: str, place: Path, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a part for so many seconds at most; return its report, or `failed` with the end of its output."""
    log, environment = place / "output.txt", {"SFTMIX_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    options: dict[str, Any] = {
        "stderr": subprocess.STDOUT,
        "cwd": ROOT,
        "env": os.environ | environment,
        "start_new_session": True,
    }
    with log.open("w") as out:
        process = subprocess.Popen(command(name, place, args.device), stdout=out, **options)
        try:
            code: int | str = process.wait(timeout=seconds)
        except BaseException as error:  # its own processes end with it, also by Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = f"stopped after {seconds:.0f} s"
    text = log.read_text(errors="replace").replace(str(place), "INPUTS").replace(f"{ROOT}/", "")
    lines = text.splitlines()
    if code:
        return {"failed": code, "end": lines[-80:]}
    if name == "tests":
        return {"said": lines[-1]}
    if name == "run":
        return {"stages": json.loads((place / "run" / "summary.json").read_text())["stages"], "verify": lines[-2:]}
    return json.loads(next(line for line in reversed(lines) if line.startswith('{"benchmark"')))


def told(name: str, report: dict[str, Any] | None) -> str:
    """Return one line on a part: what was measured, why it failed, or that it was not run."""
    if report is None:
        return "not run"
    if "failed" in report:
        return f"failed ({report['failed']}): {''.join(report['end'][-1:])}"
    if name == "tests":
        return report["said"]
    if name == "run":
        made = {stage: f["tokens"] / f["elapsed"] for stage, f in report["stages"].items() if "elapsed" in f}
        made["scoring"] = report["stages"]["reference"]["tokens"] / report["stages"]["reference"]["scoring_seconds"]
        return "; ".join([*(f"{stage} {rate:,.0f} tokens/s" for stage, rate in made.items()), *report["verify"]])
    if name == "one-rank":
        moved, steps = len(report["steps whose losses differ"]), report["steps"]
        return (
            f"killed after step {report['killed after step']}; other losses in {moved} of {steps}; {report['verify']}"
        )
    if name == "trl":
        found = {pair: ratio["speed by seconds"] for pair, ratio in report["ratios"].items()}
        made = {who: f["real_tokens_per_second"]["median"] for who, f in report["contestants"].items()}
        said = [*(f"{who} {rate:,.0f} tokens/s" for who, rate in made.items())]
        said += [f"{who} skipped: {reason}" for who, reason in report["skipped"].items()]
        return "; ".join([*said, *(f"{pair} {_with_spread(ratio)}" for pair, ratio in found.items())])
    if name == "estimate":
        found = {setting: f["estimated / measured"] for setting, f in report["settings"].items()}
        return "estimated / measured peak " + "; ".join(f"{setting} {ratio}" for setting, ratio in found.items())
    return _of_loss(report) if name.startswith("loss") else _of_step(report)


def _with_spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f}, n {ratio['n']})"


def _card(figures: dict[str, float]) -> str:
    return f", {figures['mhz']:.0f} MHz, {figures['watts']:.0f} W" if "mhz" in figures else ""


def _of_loss(report: dict[str, Any]) -> str:
    results, pair, found = report["results"], "fused_sftmix / fused_ntp", []
    for name, f in results.items():
        share = f" ({results['gemm']['seconds'] / f['seconds']:.0%} of it matmuls)" if "gemm" in results else ""
        found.append(f"{name} {1e3 * f['seconds']:.1f} ms{share}, {f['peak_mib'] / 1024:.1f} GiB{_card(f)}")
    found += [f"{name}: {error}" for name, error in report["errors"].items()]
    if pair in report:
        found.append(f"{pair} {_with_spread(report[pair]['spread'])}")
    return "; ".join(found)


def _of_step(report: dict[str, Any]) -> str:
    speed = report["real_tokens_per_second"]
    found = [f"scoring {speed['scoring']:,.0f} tokens/s"]
    for layout, made in report["chosen"].items():
        found.append(f"{layout}: {', '.join(f'{option} {value}' for option, value in made.items())}")
    for name, rate in report["gflops"].items():
        calls, share = report["a step, profiled"][name]["calls"], report["mfu"][name]
        found.append(
            f"{name} {speed[name]:,.0f} tokens/s, {rate / 1e3:.0f} TFLOP/s ({share:.1%} of the best matmul's), "
            f"{report['peak_gib'][name]:.1f} GiB, {calls.get('cudaStreamSynchronize', 0)} waits of the host"
            f"{_card(report['clock and power'].get(name, {}))}"
        )
    ratios = report["sftmix / ntp, step by step"].items()
    return "; ".join([*found, *(f"sftmix / ntp, {layout} {_with_spread(ratio)}" for layout, ratio in ratios)])


def issue(found: dict[str, dict[str, Any] | None], machine: dict[str, Any]) -> str:
    """Return the text for an issue: machine, versions, commit, and a table of all parts."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = f"### The first GPU hour on {machine['device']}\n\n"
    text += f"{versions}, CUDA {torch.version.cuda}; commit {machine['commit']}; {machine['date']}\n\n"
    text += "| part | measured | public |\n|---|---|---|\n"
    for name, report in found.items():
        text += f"| {name} | {told(name, report).replace('|', '/')} | {PUBLIC.get(name, '')} |\n"
    return text


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--out", type=Path, default=RESULTS / "first-gpu-hour")
    options.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, TRL's if it is installed")
    options.set_defaults(parts=[name for name in PARTS if name != "trl" or find_spec("trl")])
    options.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, to see it work")
    args = options.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    if not args.tiny and not torch.cuda.is_available():
        options.error("torch finds no GPU here; --tiny rehearses on a CPU")
    end, machine = time.monotonic() + 60 * args.minutes, about(args.device, ["transformers"])
    machine["device"] += ", tiny shapes" if args.tiny else ""
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(args.parts)
    for name in found:
        for path in sorted(args.out.glob(f"????-??-??-{name}-{args.device}.json")):
            found[name] = json.loads(path.read_text())
    todo = [name for name in found if "failed" in (found[name] or {"failed": ""})]
    todo.sort(key=lambda name: found[name] is not None)  # what failed before comes last
    with tempfile.TemporaryDirectory() as directory:
        if todo:
            make_inputs(Path(directory), tiny=args.tiny)
        for number, name in enumerate(todo, 1):
            left = end - time.monotonic()
            if left <= (0 if args.tiny else 60 * PARTS[name].minutes):  # a shorter one may fit
                continue
            print(f"{number}/{len(todo)} {name}: {PARTS[name].minutes} minutes, at most {left / 60:.0f}", flush=True)
            report = {**machine, "part": name, **attempt(name, Path(directory), args, left)}
            found[name] = {**report, "seconds_in_all": round(time.monotonic() - end + left, 1)}
            text = json.dumps(found[name], indent=1) + "\n"
            (args.out / f"{machine['date']}-{name}-{args.device}.json").write_text(text)
            print(f"    {told(name, report)}", flush=True)
    text = issue(found, machine)
    (args.out / "issue.md").write_text(text)
    print(f"\n{text}\n{args.out / 'issue.md'} is ready to be sent; the files beside it have everything")
    return int(any(report is None or "failed" in report for report in found.values()))


if __name__ == "__main__":
    sys.exit(main())
