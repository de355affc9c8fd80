"""The tables and bars of docs/performance.md: one function for each benchmark, and how they write numbers.

Each takes a result and yields lines of Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
WIDEST = 48
Result = Mapping[str, Any]


# ------------------------------------------------------------------------------------------- sections


def step(result: Result) -> Iterator[str]:
    layouts = result["setting"]["layouts"]
    ratios = [result[f"sftmix / ntp, {how}"] for how in ("step by step", "CPU time")]
    faster = result[f"{layouts[0]} / other layouts, step by step"]
    rows = [
        (
            layout,
            *(spread(found[layout], 3) for found in ratios),
            *([spread(faster[layout], 3) if layout in faster else number(1, 3)] if faster else []),
        )
        for layout in layouts
    ]
    head = ["micro-batches", "a step of SFTMix / of NTP", "the same by CPU time"]
    yield from table([*head, *(["speed of NTP / the first row's"] if faster else [])], rows)
    speed, mfu = result["real_tokens_per_second"], result["mfu"]
    scoring = result["scoring / training tokens per second"]
    rows = [
        (
            layout,
            *(number(speed[f"{name}, {layout}"]) for name in ("ntp", "sftmix")),
            *(number(mfu[f"{name}, {layout}"], 2) for name in ("ntp", "sftmix")),
            number(result["real tokens / slots"][layout], 3),
            number(scoring[layout], 2),
        )
        for layout in layouts
    ]
    head = ["micro-batches", "real tokens/s, NTP", "real tokens/s, SFTMix", "MFU, NTP", "MFU, SFTMix"]
    yield from table([*head, "real tokens / slots", "scoring / training speed"], rows)
    yield from bars("real tokens per second of a step", speed)


def loss(result: Result) -> Iterator[str]:
    columns = ("seconds", "cpu_seconds", "peak_mib")
    rows = [
        (f"`{name}`", *(number(found[c], digits) for c, digits in zip(columns, (2, 2, 0), strict=True)))
        for name, found in result["results"].items()
    ]
    yield from table(("loss", "seconds", "CPU seconds", "peak MiB"), rows)
    ratios = {name: found for name, found in result.items() if " / " in name and isinstance(found, Mapping)}
    rows = [(_ratio(name), *(number(found[c], 3) for c in columns)) for name, found in ratios.items()]
    yield from table(("ratio", "of seconds", "of CPU seconds", "of peak memory"), rows)


def pipeline(result: Result) -> Iterator[str]:
    rows, parts, whole = [], [], {}
    for name, arm in result["arms"].items():
        stages = arm["stages"]
        seconds = [stages.get(stage, {}).get("wall_seconds", 0) for stage in ("reference", "train")]
        measuring = stages["train"].get("calibration_seconds", 0) + stages.get("base", {}).get("wall_seconds", 0)
        rest = (stages.get("reference", {}).get("scoring_seconds", 0), measuring)
        ratios = [spread(arm[f"{key} / plain"], 3) for key in ("run", "cpu", "process")]
        rows.append((f"`{name}`", *ratios))
        parts.append((f"`{name}`", *(number(each) for each in (*seconds, *rest))))
        whole[name] = arm["run / plain"]["median"]
    yield from table(("confidence from", "time / plain", "CPU time / plain", "time with imports / plain"), rows)
    head = ("seconds, median of the runs", "reference", "target", "scoring", "measuring")
    yield from table(head, parts)
    yield from bars("the whole recipe, wall time / plain fine-tuning, median", whole)
    share = result["share_of_a_step"]
    shares = {
        "taking each example's loss on the way": share["online"]["record, share of the steps"],
        "the same, with the file of each epoch": share["online"]["both, share of the steps"],
        "checkpoints at the default interval": share["checkpoint"]["share at the default interval"],
    }
    rows = [(name, f"{number(100 * part, 3)}%") for name, part in shares.items()]
    yield from table(("of a step of training", "share"), rows)


def trl(result: Result) -> Iterator[str]:
    contestants, epochs = result["contestants"], result["setting"]["epochs"]
    rows, needs, ratios = [], [], []
    for name, found in contestants.items():
        speeds = [spread(found[f"real_tokens_per_{unit}second"], 0, epochs) for unit in ("", "cpu_")]
        rows.append((f"`{name}`", *speeds, number(found["real tokens / slots"], 3)))
        peaks = [number(found[key]) for key in ("peak_mib_above_the_loaded_model", "peak_mib")]
        needs.append((f"`{name}`", *peaks, *(number(found[key], 4) for key in ("train_nll", "held_out_nll"))))
    yield from table(("trainer", "real tokens/s", "real tokens per CPU second", "real tokens / slots"), rows)
    peaks_and_nlls = ("peak MiB above the model", "peak MiB in all", "NLL, training rows", "NLL, held-out rows")
    yield from table(("trainer", *peaks_and_nlls), needs)
    speed = {name: found["real_tokens_per_second"]["median"] for name, found in contestants.items()}
    yield from bars("real tokens per second, median of the epochs", speed)
    for name, found in result["ratios"].items():
        speeds = [spread(found[f"speed by {key}"], 2, epochs) for key in ("seconds", "cpu_seconds")]
        peaks = [number(found[key], 3) for key in ("peak_mib_above_the_loaded_model", "peak_mib")]
        ratios.append((_ratio(name), *speeds, *peaks, number(found["held_out_nll"], 4, sign="+")))
    head = ("ours / theirs", "speed", "by CPU time", "peak above the model", "peak in all", "held-out NLL, difference")
    yield from table(head, ratios)


def startup(result: Result) -> Iterator[str]:
    loads = [(name, result[name]) for name in ("load, first time", "load, cached")]
    rows = [(name, number(found["seconds"], 2), number(found["peak_growth_mib"])) for name, found in loads]
    steps = "start to first step, cached, seconds"
    rows.append((steps.removesuffix(", seconds"), ", ".join(number(seconds, 2) for seconds in result[steps]), ""))
    yield from table((f"{number(result['setting']['count'])} rows", "seconds", "MiB at the peak"), rows)


def scale(result: Result) -> Iterator[str]:
    sizes = list(next(iter(result["rows"].values())))
    rows = []
    for name, found in result["rows"].items():
        last = found[sizes[-1]]
        seconds = [number(found[size]["cpu_seconds"], 2) for size in sizes]
        rows.append((name, *seconds, number(last["exponent"], 2), number(last["mib"])))
    most = f"{number(int(sizes[-1]))} rows"
    yield from table(("work", *(f"{number(int(size))} rows" for size in sizes), "exponent", f"MiB, {most}"), rows)
    seconds = {name: found[sizes[-1]]["cpu_seconds"] for name, found in result["rows"].items()}
    longest = dict(sorted(seconds.items(), key=lambda item: -item[1])[:10])
    yield from bars(f"CPU seconds of {most}, the ten longest", longest)
    settings = {**result["steps"], "ranks": result["ranks"]}
    flat = [(f"{by}: {number(int(value))}", f) for by, found in settings.items() for value, f in found.items()]
    rows = [
        (name, number(f["tokens"]), number(f["seconds"], 2), number(f["cpu_seconds"], 2), number(f["mib"]))
        for name, f in flat
    ]
    head = ("a step of training", "tokens", "seconds", "CPU seconds of rank 0", "MiB above the model, of one rank")
    yield from table(head, rows)


def estimate(result: Result) -> Iterator[str]:
    digits = {"estimated_mib": 0, "measured_mib": 0, "estimated / measured": 3, "gflops_per_second": 1}
    rows = [(name, *(number(f[key], d) for key, d in digits.items())) for name, f in result["settings"].items()]
    yield from table(("setting", "estimated MiB", "measured MiB", "estimated / measured", "GFLOP/s"), rows)


def lora(result: Result) -> Iterator[str]:
    trained, peaks = result["trained_numbers"], result["peak_mib_above_the_loaded_model"]
    rows = [(a, number(trained[a]), spread(result["seconds_per_step"][a], 2), number(peaks[a])) for a in trained]
    yield from table(("weights", "trained numbers", "seconds per step", "peak MiB"), rows)
    memory, ratio = number(result["lora / full memory"], 3), spread(result["lora / full seconds, step by step"], 3)
    row = ("lora / full", number(trained["lora"] / trained["full"], 3), ratio, memory)
    yield from table(("ratio", "of trained numbers", "of seconds, step by step", "of peak memory"), [row])


def compare(result: Result) -> Iterator[str]:
    ratios = {"the whole / its stages": result["ratio"], "the same command again / the first": result["again"]}
    yield from table(("what", "ratio"), [(name, number(ratio, 3)) for name, ratio in ratios.items()])


# ----------------------------------------------------------------------------------- numbers and words


def number(value: float, digits: int = 0, *, sign: str = "") -> str:
    """The one way to write a number: so many decimals, commas between thousands, no minus before a zero."""
    text = f"{value:{sign},.{digits}f}"
    return text if text.strip("-+0.") else text.lstrip("-+")


def counted(count: int, things: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{number(count)} {things[:-1] if count == 1 else things}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


def values(found: Mapping[str, float], count: int) -> list[float]:
    """Two or three values, from their quartiles: those lie a quarter of the way between them, or half of it."""
    low, middle, high = (found[key] for key in ("q1", "median", "q3"))
    if count == 2:
        return [(3 * low - high) / 2, (3 * high - low) / 2]
    return [2 * low - middle, middle, 2 * high - middle]


def spread(found: Mapping[str, float], digits: int = 0, count: int = 4) -> str:
    """Median and quartiles; where there were fewer than four values, the values themselves, in order.

    count  how many values there were, for results that do not say
    """
    low, middle, high = (number(found[key], digits) for key in ("q1", "median", "q3"))
    if found["q1"] == found["q3"]:
        return middle
    count = int(found.get("n", count))
    if count < 4:
        return ", ".join(number(value, digits) for value in values(found, count))
    return f"{middle} ({low} to {high})"


def _ratio(name: str) -> str:
    return " / ".join(f"`{part}`" for part in name.split(" / "))


# ------------------------------------------------------------------------------------ tables, pictures


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    columns = zip(*rows, strict=True)  # those of numbers stand at the right
    yield "| " + " | ".join(head) + " |"
    yield "|" + "".join("---:|" if all(each[:1] in "+-0123456789" for each in column) else "---|" for column in columns)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines that a reader opens by a click, on the site and on GitHub."""
    yield from (f'<details markdown="1"><summary>{title}</summary>', "", *lines, "</details>", "")


def bars(title: str, values: Mapping[str, float]) -> Iterator[str]:
    """Horizontal bars with their values, as text: they need no file and no colours."""
    longest = max(values.values()) or 1.0
    digits = 0 if min(values.values()) >= 100 else 2
    width = max(map(len, values))
    yield from ("```text", title, "")
    for name, value in values.items():
        yield f"{name:{width}}  {bar(value / longest)} {number(value, digits)}"
    yield from ("```", "")


def bar(share: float) -> str:
    """A bar of WIDEST characters for 1, in eighths of a character."""
    eighths = round(share * WIDEST * 8)
    return "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]
