"""Writes docs/performance.md and its pictures from the newest files in benchmarks/results/.

    python docs/make_performance.py

A test compares the files with what this writes. No figure of the page stands anywhere else; a part of it is there as
soon as its benchmark has a result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
Result = Mapping[str, Any]

_INTRO = """\
# Performance

<!-- Written by docs/make_performance.py from benchmarks/results/; edit that, not this file. -->

What SFTMix costs beside plain fine-tuning, and how fast this trainer is beside others. Every figure is from a file in
[benchmarks/results](../benchmarks/results) that a script in [benchmarks](../benchmarks) wrote; the commands are
[below](#files-and-commands).

**All of it was measured on a CPU, and CPU ratios do not carry over to a GPU.** On a CPU a padded slot costs what a
real one costs, small matrix products are nearly as fast as large ones, and nothing waits for a kernel to be launched or
for another device. What carries over is what is counted rather than timed: passes over the data, slots per real token,
logits in memory. Ratios are of contestants that took turns on the same machine; single seconds depend on it.

Where two figures follow the median in brackets, they are the quartiles; a third is the number of values where there
were fewer than four.
"""

_STEP = """\
Both train on the same batches, in turns. Mixup needs no forward pass and no matrix product of its own: the head is
linear, so the mixed logits are mixtures of logits that are there anyway. Length groups are the default on a CPU;
without padding, all examples of a micro-batch stand in one row, and attention on a CPU pays for the whole square. MFU
is the share of the device's best matrix product in the same run. Scoring is a forward pass over rows sorted by
length."""

_LOSS = """\
Forward and backward of head and loss alone. The naive loss writes the formula down as the paper has it; ours never
holds the logits of all rows."""

_PIPELINE = """\
Whole runs from rows to exported model, in turns. A reference of the same size doubles the training; each scoring is a
forward pass over all rows. What is saved by losses taken on the way, by a smaller reference, or by none is said in
[the README](../README.md), by arithmetic. `measuring` is the confidence of a sample of rows under the base model and
after training, which the plain run has, too."""

_TRL = """\
TRL's SFTTrainer on the same token ids and labels from the same weights, each in a process of its own, step by step in
turns. `trl_default` keeps TRL's own choice of bf16 and gradient checkpointing, on CPU, too; the others have our
precision and no checkpointing. `trl_grouped` sorts up to 50 global batches of rows by length (a quarter of a small
data set: the more rows, the less padding), which couples what is in a batch to its length; `trl_best` also takes
smaller micro-batches. Ours draws batches and pairs at random and groups by length only inside a micro-batch. The order
of the rows differs between them, and so, a little, do the NLLs; in the same order they are equal step by step to six
digits (tests/test_ntp_equality.py).

Where the difference comes from: padded slots (third column), and the head, which TRL computes on a CPU at every
position, padded and prompt ones included, once more in the backward pass; ours is computed once, at response tokens
only. Where those are a small share, as with a small vocabulary and rows sorted by length, so is the difference."""

_SCALE = """\
Everything a run does per row, but training. CPU seconds of synthetic rows of about 40 tokens, with those of processes
that tokenise beside it, whose memory is not in the last column; the exponent is that of the growth over the last factor
of rows: 1 is linear."""

_STARTUP = """\
Tokenising is cached by content: the second start reads it back. The first step waits for the imports, the rows and the
model; what is measured of the base model is measured after the training
([decision 10](decisions/0010-the-base-model-is-measured-last.md))."""

_ESTIMATE = """\
Peak of resident memory of the training stage, of a random Llama on a CPU; the estimate knows the configuration alone.
How much of what is freed glibc keeps is not estimated; `give-back` is a run that returns all of it."""

_LORA = "Same trainer, rows and pairs, in turns; memory above the loaded model, in a process of its own."

_COMPARE = "A table of variants and seeds shares stages: wall time of the whole / of the stages that had to be made."


def latest(name: str, device: str = "cpu") -> dict[str, tuple[str, Result]]:
    """The newest result of a benchmark: file name and content, by its variant ("" where it has none)."""
    found = {}
    for path in sorted(RESULTS.glob(f"????-??-??-{name}*-{device}.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["benchmark"] == name:
            found[result.get("variant", "")] = (path.name, result)
    return dict(sorted(found.items()))


def files() -> dict[Path, str]:
    """Everything that this script writes, by its place."""
    sections = {
        "step": ("A step", _STEP, step),
        "loss": ("Head and loss", _LOSS, loss),
        "pipeline": ("The whole recipe", _PIPELINE, pipeline),
        "trl_compare": ("Beside TRL", _TRL, trl),
        "startup": ("Start", _STARTUP, startup),
        "scale": ("Many rows, long rows, large vocabularies, two ranks", _SCALE, scale),
        "estimate": ("What `sftmix estimate` says, and what is needed", _ESTIMATE, estimate),
        "lora": ("LoRA", _LORA, lora),
        "compare": ("Tables of many runs", _COMPARE, compare),
    }
    parts, used, made = [_INTRO], [], {}
    for name, (title, about, section) in sections.items():
        results = latest(name)
        parts += ["\n".join([f"## {title}", "", about, ""])] if results else []
        for variant, found in results.items():
            lines = [f"### {variant}", ""] if variant else []
            parts.append("\n".join([*lines, *section(found[1], made), f"[`{name}`](#files-and-commands)", ""]))
            used.append((f"{name} {variant}".strip(), *found))
    parts.append("\n".join(["## Files and commands", "", *_commands(used), ""]))
    return {DOCS / "performance.md": "\n".join(parts), **made}


def _commands(used: Sequence[tuple[str, str, Result]]) -> Iterator[str]:
    yield from ("| | file | date, commit, load | device | command |", "|---|---|---|---|---|")
    for name, file, result in used:
        link = f"[{file}](../benchmarks/results/{file})"
        about = ", ".join([result["date"], str(result.get("commit")), str(result.get("load_average"))])
        typed = command(result["benchmark"], result)
        yield f"| {name} | {link} | {about} | {result['device']} | `{typed}` |"


def command(name: str, result: Result) -> str:
    """What was typed; of results that do not keep it, what would give their setting."""
    if "command" in result:
        return result["command"]
    flags = []
    for key, value in result["setting"].items():
        words = " ".join(map(str, value)) if isinstance(value, list) else value
        flags += [] if value is None or value is False else [f"--{key}" if value is True else f"--{key} {words}"]
    return " ".join(["python", f"benchmarks/{name}.py", *flags])


# ------------------------------------------------------------------------------------------- sections


def step(result: Result, made: dict[Path, str]) -> Iterator[str]:
    ratios = [result[f"sftmix / ntp, {how}"] for how in ("step by step", "CPU time")]
    others = next(found for name, found in result.items() if name.endswith(" / other layouts, step by step"))
    speed, mfu = result["real_tokens_per_second"], result["mfu"]
    rows = [
        (
            layout,
            *(spread(found[layout]) for found in ratios),
            spread(others[layout], 2) if layout in others else 1,
            *(f"{speed[f'{name}, {layout}']:,.0f}" for name in ("ntp", "sftmix")),
            slots,
            *(f"{mfu[f'{name}, {layout}']:.2f}" for name in ("ntp", "sftmix")),
            result["scoring / training tokens per second"][layout],
        )
        for layout, slots in result["real tokens / slots"].items()
    ]
    head = ("micro-batches", "a step of SFTMix / of NTP", "by CPU time", "speed of NTP beside the first row")
    head += ("real tokens/s, NTP", "SFTMix", "real tokens / slots", "MFU, NTP", "SFTMix", "scoring / training speed")
    yield from table(head, rows)
    yield from picture(_named("performance-step", result), "real tokens per second of a step", speed, made)


def loss(result: Result, made: dict[Path, str]) -> Iterator[str]:
    columns = ("seconds", "cpu_seconds", "peak_mib")
    rows = [(f"`{name}`", *(found[c] for c in columns)) for name, found in result["results"].items()]
    yield from table(("loss", "seconds", "CPU seconds", "peak MiB"), rows)
    ratios = {name: found for name, found in result.items() if " / " in name and isinstance(found, Mapping)}
    rows = [(name.replace("_", " "), *(found[c] for c in columns)) for name, found in ratios.items()]
    yield from table(("ratio", "seconds", "CPU seconds", "peak MiB"), rows)


def pipeline(result: Result, made: dict[Path, str]) -> Iterator[str]:
    rows, bars = [], {}
    for name, arm in result["arms"].items():
        stages = arm["stages"]
        seconds = [stages.get(stage, {}).get("wall_seconds", 0) for stage in ("reference", "train")]
        measuring = stages["train"].get("calibration_seconds", 0) + stages.get("base", {}).get("wall_seconds", 0)
        rest = (stages.get("reference", {}).get("scoring_seconds", 0), measuring)
        ratios = [spread(arm[f"{key} / plain"]) if f"{key} / plain" in arm else "" for key in ("run", "cpu", "process")]
        rows.append((f"`{name}`", *ratios, *(f"{s:,.0f}" for s in (*seconds, *rest))))
        bars[name] = arm["run / plain"]["median"] if "run / plain" in arm else arm["run_seconds"]["median"]
    head = ("confidence from", "time / plain", "CPU time / plain", "with imports", "reference s", "target s")
    yield from table((*head, "scoring s", "measuring s"), rows)
    yield from picture("performance-recipe", "the whole recipe, wall time / plain fine-tuning", bars, made)
    share = result["share_of_a_step"]
    yield from table(
        ("of a step of training", "share"),
        [
            ("taking each example's loss on the way", f"{share['online']['record, share of the steps']:.3%}"),
            ("the same, with the file of each epoch", f"{share['online']['both, share of the steps']:.3%}"),
            ("checkpoints at the default interval", f"{share['checkpoint']['share at the default interval']:.2%}"),
        ],
    )


def trl(result: Result, made: dict[Path, str]) -> Iterator[str]:
    rows = []
    for name, found in result["contestants"].items():
        speeds = [spread(found[f"real_tokens_per_{unit}second"], 0) for unit in ("", "cpu_")]
        peaks = [f"{found[key]:,.0f}" for key in ("peak_mib_above_the_loaded_model", "peak_mib")]
        nlls = [f"{found[key]:.4f}" for key in ("train_nll", "held_out_nll")]
        rows.append((f"`{name}`", *speeds, found["real tokens / slots"], *peaks, *nlls))
    head = ("trainer", "real tokens/s", "per CPU second", "real tokens / slots", "peak MiB above the model")
    yield from table((*head, "peak MiB in all", "NLL, training rows", "NLL, held out"), rows)
    bars = {name: found["real_tokens_per_second"]["median"] for name, found in result["contestants"].items()}
    yield from picture(_named("performance-trl", result), "real tokens per second", bars, made)
    rows = []
    for name, found in result["ratios"].items():
        speeds = [spread(found[f"speed by {key}"], 2) for key in ("seconds", "cpu_seconds")]
        peaks = [found[key] for key in ("peak_mib_above_the_loaded_model", "peak_mib")]
        rows.append((f"`{name}`", *speeds, *peaks, f"{found['held_out_nll']:+.4f}"))
    head = ("ours / theirs", "speed", "speed by CPU time", "peak memory above the model", "in all")
    yield from table((*head, "held-out NLL, difference"), rows)


def startup(result: Result, made: dict[Path, str]) -> Iterator[str]:
    steps = "start to first step, cached, seconds"
    rows = [(f"{name}: seconds; MiB", f"{result[name]['seconds']}; {result[name]['peak_growth_mib']}")
            for name in ("load, first time", "load, cached")]  # fmt: skip
    rows.append((steps, ", ".join(map(str, result[steps]))))
    yield from table((f"{result['setting']['count']:,} rows", "measured"), rows)


def scale(result: Result, made: dict[Path, str]) -> Iterator[str]:
    sizes = list(next(iter(result["rows"].values())))
    rows = []
    for name, found in result["rows"].items():
        last = found[sizes[-1]]
        rows.append((name, *(f"{found[s]['cpu_seconds']:.2f}" for s in sizes), last.get("exponent", ""), last["mib"]))
    head = ("work", *(f"{int(size):,} rows" for size in sizes), "exponent", "MiB at the most rows")
    yield from table(head, rows)
    bars = {name: found[sizes[-1]]["cpu_seconds"] for name, found in result["rows"].items()}
    longest = dict(sorted(bars.items(), key=lambda item: -item[1])[:10])
    yield from picture("performance-rows", f"CPU seconds of {int(sizes[-1]):,} rows, the ten longest", longest, made)
    settings = {f"{name}: {value}": found for name, by in result["steps"].items() for value, found in by.items()}
    settings |= {f"ranks: {count}": found for count, found in result["ranks"].items()}
    rows = [
        (name, f["tokens"], f"{f['seconds']:.3f}", f"{f['cpu_seconds']:.3f}", f["mib"]) for name, f in settings.items()
    ]
    head = ("a step of training", "tokens", "seconds", "CPU seconds of rank 0", "MiB above the model, of one rank")
    yield from table(head, rows)


def estimate(result: Result, made: dict[Path, str]) -> Iterator[str]:
    keys = ("estimated_mib", "measured_mib", "estimated / measured", "gflops_per_second")
    rows = [(name, *(found[key] for key in keys)) for name, found in result["settings"].items()]
    yield from table(("setting", "estimated MiB", "measured MiB", "estimated / measured", "GFLOP/s"), rows)


def lora(result: Result, made: dict[Path, str]) -> Iterator[str]:
    trained, peaks = result["trained_numbers"], result["peak_mib_above_the_loaded_model"]
    rows = [(arm, f"{trained[arm]:,}", spread(result["seconds_per_step"][arm]), peaks[arm]) for arm in trained]
    ratio = spread(result["lora / full seconds, step by step"])
    rows.append(("lora / full", f"{trained['lora'] / trained['full']:.4f}", ratio, result["lora / full memory"]))
    yield from table(("", "trained numbers", "seconds per step", "peak MiB"), rows)


def compare(result: Result, made: dict[Path, str]) -> Iterator[str]:
    rows = [("the whole / its stages", result["ratio"]), ("the same command again / the first", result["again"])]
    yield from table(("what", "ratio"), rows)


# ------------------------------------------------------------------------------------ tables, pictures


def spread(found: Mapping[str, float], digits: int = 3) -> str:
    """Median and quartiles, and how many values they are of where those are few."""
    low, middle, high = (f"{found[key]:,.{digits}f}" for key in ("q1", "median", "q3"))
    few = f"; {found['n']}" if found.get("n", 4) < 4 else ""
    return middle if low == middle == high else f"{middle} ({low} to {high}{few})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    yield ""


def _named(name: str, result: Result) -> str:
    """Each variant of a benchmark has a picture of its own."""
    return "-".join([name, *filter(None, [result.get("variant")])])


def picture(name: str, title: str, bars: Mapping[str, float], made: dict[Path, str]) -> Iterator[str]:
    """Keeps horizontal bars as docs/images/<name>.svg, and shows them."""
    made[DOCS / "images" / f"{name}.svg"] = svg(title, bars)
    yield from (f"![{title}](images/{name}.svg)", "")


def svg(title: str, bars: Mapping[str, float]) -> str:
    """Horizontal bars with their values, on white."""
    height, left, width = 24, 230, 420
    longest = max(bars.values()) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{40 + height * len(bars)}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, value) in enumerate(bars.items()):
        y, long = 34 + height * number, value / longest * width
        shown = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="17" fill="#2166ac"/>')
        parts.append(f'<text x="{left + long + 6:.1f}" y="{y + 13}">{shown}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
