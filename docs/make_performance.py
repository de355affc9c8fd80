"""Writes docs/performance.md from the newest files in benchmarks/results/.

    python docs/make_performance.py

A test compares the page with what this writes. No figure of the page stands anywhere else; a part of it is there as
soon as its benchmark has a result. The tables are made in performance_tables.py.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from performance_tables import (
    DOCS,
    Result,
    compare,
    counted,
    estimate,
    listed,
    lora,
    loss,
    number,
    pipeline,
    scale,
    spread,
    startup,
    step,
    table,
    trl,
)

RESULTS = DOCS.parent / "benchmarks" / "results"

_INTRO = """\
# Performance

<!-- Written by docs/make_performance.py from benchmarks/results/; edit that, not this file. -->

What SFTMix costs beside plain fine-tuning, and how fast this trainer is beside others. Every figure is from a file in
[benchmarks/results](../benchmarks/results) that a script in [benchmarks](../benchmarks) wrote; the commands are
[below](#files-and-commands).

**To run them yourself:** by default the benchmarks take models and rows from a directory `shared` beside the checkout
(`../shared`), which the repository does not have. Others are named as in
`python benchmarks/step.py --model DIR --rows FILE`; only `python benchmarks/estimate.py --source DIR --rows FILE` calls
the model differently. `loss.py`, `lora.py` and `compare.py` need neither, and `scale.py` no rows. The rows of TRL in
the tables need `pip install -e '.[bench]'`.

**All of it was measured on a CPU, and CPU ratios do not carry over to a GPU.** On a CPU a padded slot costs what a
real one costs, small matrix products are nearly as fast as large ones, and nothing waits for a kernel to be launched or
for another device. What carries over is what is counted rather than timed: passes over the data, slots per real token,
logits in memory.

**How to read the figures:**

- Ratios are of contestants that took turns on the same machine. Seconds, tokens per second and MFU depend on what else
  the machine did: compare them inside a table, not between tables.
- `1.02 (1.01 to 1.05)` is a median with its quartiles. Where there were fewer than four values, all of them stand
  there, in order: `1.01, 1.05`.
- A ratio of SFTMix to NTP below 1 is noise of the machine. Mixup does all that the same step without it does, and
  more; it cannot be faster. So how far a ratio is below 1 says how far one above 1 may be off.
- The load average under a heading is how many processes wanted a core during the last minute of the benchmark, which
  counts itself. Above its number of threads, other work was going on. The more steps or rounds, the less that matters.
"""

_STEP = """\
Both train on the same batches, in turns. Mixup needs no forward pass and no matrix product of its own: the head is
linear, so the mixed logits are mixtures of logits that are there anyway. Length groups are the default on a CPU;
without padding, all examples of a micro-batch stand in one row, and attention on a CPU pays for the whole square. MFU
is the share of the device's best matrix product in the same run. Scoring is a forward pass over rows sorted by
length. The ratios are medians of single steps; tokens per second and MFU are of all steps together, in which a slow
one counts for more."""

_STEP_AGAIN = """\
Trust the row with the most steps. In a few steps on a machine that has other work, a ratio moves by several percent,
and tokens per second and MFU by far more; MFU moves with the best matrix product of the run, too."""

_LOSS = """\
Forward and backward of head and loss alone; a row is the position of a token that is predicted. Seconds are medians of
the rounds, and the ratios medians of the ratios of each round."""

_LOSSES = {
    "gemm": "the three matrix products that every head needs and nothing else; no loss is faster but by noise",
    "naive_sftmix": "the formula as the paper has it, which holds the logits of all rows",
    "torch_ntp": "torch's own head with cross entropy, without Mixup",
    "trl_ntp": "TRL's chunked head, without Mixup",
    "liger_ntp": "Liger's fused head, without Mixup",
    "fused_ntp": "ours without Mixup",
    "fused_sftmix": "ours with Mixup; it never holds the logits of all rows",
}

_PIPELINE = """\
Whole runs from rows to exported model, in turns. What is saved by losses taken on the way, by a smaller reference, or
by none is said in [cost](cost.md), by arithmetic. `time with imports` is that of the process. The seconds
are of whole stages: scoring is a part of the reference's. `measuring` is the confidence of a sample of rows under the
base model and after training (this is a part of the target's seconds), which the plain run has, too. A ratio of
`single` below 1 is noise: it trains as `plain` does, with Mixup from the second epoch on."""

_ARMS = {
    "plain": "NTP, without pairs; the others are divided by it",
    "offline": "a reference of the same size that scores all rows at five checkpoints; each scoring is a forward pass",
    "online": "a reference of the same size whose losses are taken while it trains",
    "weaker": "a reference of about an eighth of the size, five checkpoints",
    "single": "no reference; the target's own losses decide from the second epoch on",
}

_TRL = """\
TRL's SFTTrainer on the same token ids and labels from the same weights, each in a process of its own, step by step in
turns; one value of speed for each epoch. The order of the rows differs between them, and so, a little, do the NLLs; in
the same order they are equal step by step to six digits (tests/test_ntp_equality.py). Ours draws batches and pairs at
random and groups by length only inside a micro-batch. Where `ours_sftmix` is faster than `ours_ntp`, that is noise.

Where the difference comes from: padded slots (what `real tokens / slots` is below 1), and the head, which TRL computes
on a CPU at every position, padded and prompt ones included, once more in the backward pass; ours is computed once, at
response tokens only. Where those are a small share, as with a small vocabulary and rows sorted by length, so is the
difference."""

_TRAINERS = {
    "trl_default": "TRL's own choice of bf16 and gradient checkpointing, on a CPU, too; the others have our precision "
    "and no checkpointing",
    "trl_random": "TRL in our precision, without gradient checkpointing; batches drawn at random",
    "trl_grouped": "the same, but up to 50 global batches of rows are sorted by length (a quarter of a small data set: "
    "the more rows, the less padding), which couples what is in a batch to its length",
    "trl_best": "sorted as `trl_grouped`, in smaller micro-batches",
    "ours_ntp": "ours without Mixup, in the order of SFTMix",
    "ours_sftmix": "ours with Mixup, on random halves",
}

_STARTUP = """\
Tokenising is cached by content: the second start reads it back. The first step, of three starts, waits for the
imports, the rows and the model; what is measured of the base model is measured after the training
([decision 10](decisions/0010-the-base-model-is-measured-last.md))."""

_SCALE = """\
Everything a run does per row, but training. CPU seconds of synthetic rows of about 40 tokens, with those of processes
that tokenise beside it, whose memory is not in the last column: MiB at the peak above what was held before. The
exponent is that of the growth over the last factor of rows: 1 is linear."""

_ESTIMATE = """\
Peak of resident memory of the training stage, of a random Llama on a CPU; the estimate knows the configuration alone.
How much of what is freed glibc keeps is not estimated; where a heading says that freed memory is given back
(`python benchmarks/estimate.py --give_back`), the run keeps none of it. GFLOP/s are the FLOPs that are estimated for
the training over the time that its steps took, the rate that `--tflops` times `--mfu` stand for: that of this CPU
under its load, of few steps."""

_ESTIMATE_AGAIN = """\
A run that gives freed memory back says how good the estimate is. For what other runs take, trust the newer version of
the code: from commit db41144 on, scoring on a CPU takes smaller batches, and less memory. The rest of the
difference is what glibc keeps, which depends on the order of sizes."""

_LORA = "Same trainer, rows and pairs, in turns; memory above the loaded model, in a process of its own."

_COMPARE = """\
A table of variants and seeds shares stages: wall time of the whole / of the stages that had to be made. What is not in
a stage (imports, parsing, reading the cache) takes the same time however long the stages are, so the ratio of the
longer trainings is the one that says what real tables cost."""


class Again(NamedTuple):
    """What tells rows apart that are in several results: which setting lists them, and the figure to compare."""

    title: str
    about: str
    setting: str
    column: str
    value: Callable[[Result, str], str]

    def names(self, results: Sequence[Result]) -> list[str]:
        """Rows that are in more than one of the results."""
        every = [name for result in results for name in result["setting"][self.setting]]
        return [name for name in dict.fromkeys(every) if every.count(name) > 1]


class Part(NamedTuple):
    """A section of the page.

    heading  what was varied, from a result's own setting, in words
    words    what the names under `names` of its results mean; those that are in none are left out
    again    where rows may be in several results
    """

    title: str
    about: str
    tables: Callable[[Result], Iterator[str]]
    heading: Callable[[Mapping], str] = lambda setting: ""
    names: str = ""
    words: Mapping[str, str] = {}
    again: Again | None = None


def _step_heading(setting: Mapping) -> str:
    names = listed(setting["layouts"])
    return f"{names[0].upper()}{names[1:]}: {counted(setting['steps'], 'steps')}"


def _loss_heading(setting: Mapping) -> str:
    return f"Head of {setting['head']}, {setting['dtype']}, {counted(setting['rows'], 'rows')}"


def _trl_heading(setting: Mapping) -> str:
    wide = setting["vocabulary"]
    model = f"A random Llama with a vocabulary of {number(wide)}" if wide else f"Model {Path(setting['model']).name}"
    ours, theirs = setting["micro_batch_size"], setting["trl_micro_batch_size"]
    sizes = f"{ours}" if ours == theirs else f"{ours} (ours) and {theirs} (TRL)"
    return f"{model}, {setting['precision']}, micro-batches of {sizes} rows"


def _estimate_heading(setting: Mapping) -> str:
    chosen = setting["settings"]
    names = listed(chosen) if len(chosen) < 4 else counted(len(chosen), "settings")
    return f"{names[0].upper()}{names[1:]}{', freed memory given back' if setting['give_back'] else ''}"


def _compare_heading(setting: Mapping) -> str:
    return f"{counted(setting['steps'], 'steps')} of every training"


_STEPS = Again(
    "Which steps to trust",
    _STEP_AGAIN,
    "layouts",
    "a step of SFTMix / of NTP",
    lambda result, name: spread(result["sftmix / ntp, step by step"][name], 3),
)
_ESTIMATES = Again(
    "Which estimates to trust",
    _ESTIMATE_AGAIN,
    "settings",
    "estimated / measured",
    lambda result, name: number(result["settings"][name]["estimated / measured"], 3),
)

PARTS = {
    "step": Part("A step", _STEP, step, _step_heading, again=_STEPS),
    "loss": Part("Head and loss", _LOSS, loss, _loss_heading, "results", _LOSSES),
    "pipeline": Part("The whole recipe", _PIPELINE, pipeline, names="arms", words=_ARMS),
    "trl_compare": Part("Beside TRL", _TRL, trl, _trl_heading, "contestants", _TRAINERS),
    "startup": Part("Start", _STARTUP, startup),
    "scale": Part("Many rows, long rows, large vocabularies, two ranks", _SCALE, scale),
    "estimate": Part(
        "What `sftmix estimate` says, and what is needed", _ESTIMATE, estimate, _estimate_heading, again=_ESTIMATES
    ),
    "lora": Part("LoRA", _LORA, lora),
    "compare": Part("Tables of many runs", _COMPARE, compare, _compare_heading),
}
_COUNTS = {
    "steps": "steps",
    "warm_up": "warm-up rounds",
    "rounds": "rounds",
    "epochs": "epochs",
    "seeds": "seeds",
    "limit": "rows",
    "threads": "threads",
}


def latest(name: str, device: str = "cpu") -> dict[str, tuple[str, Result]]:
    """The newest result of a benchmark: file name and content, by its variant ("" where it has none), 40 before 120."""
    found = {}
    for path in sorted(RESULTS.glob(f"????-??-??-{name}*-{device}.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["benchmark"] == name:
            found[result.get("variant", "")] = (path.name, result)
    return {variant: found[variant] for variant in sorted(found, key=_natural)}


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def page() -> str:
    """Everything that this script writes."""
    lines: list[str] = []
    used: list[tuple[str, str, Result]] = []
    for name, part in PARTS.items():
        found = list(latest(name).values())
        results = [result for _, result in found]
        lines += _opening(part, results) if results else []
        for file, result in found:
            heading = part.heading(result["setting"])
            lines += [f"### {heading}", ""] if heading else []
            lines += [f"{measured(result)}{see_also(part, result, results)}", "", *part.tables(result)]
            used.append((f"**{part.title}.**{f' {heading}.' if heading else ''}", file, result))
        lines += trusted(part, results)
    return "\n".join([_INTRO, *lines, "## Files and commands", "", *_commands(used), ""])


def _opening(part: Part, results: Sequence[Result]) -> list[str]:
    """Title, text, and the words for those names that are in the results."""
    names = {name for result in results for name in result.get(part.names, ())} if part.words else set()
    words = [f"- `{name}`: {part.words[name]}" for name in sorted(names, key=list(part.words).index)]
    wrapped = [textwrap.fill(each, 120, subsequent_indent="  ", break_on_hyphens=False) for each in words]
    return [f"## {part.title}", "", part.about, "", *wrapped, *([""] if words else [])]


def measured(result: Result) -> str:
    """How much was measured, and beside what."""
    setting = result["setting"]
    counts = [counted(setting[key], things) for key, things in _COUNTS.items() if key in setting]
    beside = f"load average {number(result['load_average'], 2)}, commit {result['commit']}"
    return f"Measured with {', '.join(counts)}; {beside}."


def see_also(part: Part, result: Result, results: Sequence[Result]) -> str:
    """Where it is said which table to trust, if a row of this one is in another, too."""
    if part.again is None:
        return ""
    key = part.again.setting
    names = [name for name in part.again.names(results) if name in result["setting"][key]]
    others = [other for other in results if other is not result and set(names) & set(other["setting"][key])]
    if not others:
        return ""
    steps = listed([number(count) for count in sorted({other["setting"]["steps"] for other in others}, reverse=True)])
    link = f"[which to trust](#{part.again.title.lower().replace(' ', '-')})"
    return f" Other tables, of {steps} steps, have {listed([f'*{name}*' for name in names])}, too: {link}."


def trusted(part: Part, results: Sequence[Result]) -> list[str]:
    """A table of the rows that are in several results, the one with the most steps first, and which to trust."""
    if part.again is None or not part.again.names(results):
        return []
    rows = []
    for name in part.again.names(results):
        has = [result for result in results if name in result["setting"][part.again.setting]]
        for result in sorted(has, key=lambda result: -result["setting"]["steps"]):
            at = (number(result["setting"]["steps"]), number(result["load_average"], 2), result["commit"])
            rows.append((name, part.heading(result["setting"]), *at, part.again.value(result, name)))
    head = ("measured more than once", "under the heading", "steps", "load average", "commit", part.again.column)
    return [f"### {part.again.title}", "", part.again.about, "", *table(head, rows)]


def _commands(used: Sequence[tuple[str, str, Result]]) -> Iterator[str]:
    for title, file, result in used:
        link = f"[{file}](../benchmarks/results/{file})"
        about = f"{result['date']}, commit {result['commit']}, {result['device']}"
        yield from (f"- {title} {link}; {about}:<br>", f"  `{command(result['benchmark'], result)}`")


def command(name: str, result: Result) -> str:
    """What was typed; of results that do not keep it, what would give their setting."""
    if "command" in result:
        return result["command"]
    flags = []
    for key, value in result["setting"].items():
        words = " ".join(map(str, value)) if isinstance(value, list) else value
        flags += [] if value is None or value is False else [f"--{key}" if value is True else f"--{key} {words}"]
    return " ".join(["python", f"benchmarks/{name}.py", *flags])


if __name__ == "__main__":
    (DOCS / "performance.md").write_text(page(), encoding="utf-8")
