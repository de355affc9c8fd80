"""Figures over the optimizer steps of a run. Each is None where the run has nothing to show there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from sftmix.tools.report.figures import COLOURS, GROUPS, MIXUP_COLOUR, figure
from sftmix.tools.report.run import ARMS, RunView

CURVE = 800
"""Most points of a curve; longer ones are averaged in bins of equal length."""


def curve(steps: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Return a curve without missing values, averaged in bins if it is longer than CURVE."""
    kept = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
    size = math.ceil(len(kept) / CURVE) or 1
    bins = [kept[start : start + size] for start in range(0, len(kept), size)]
    return [b[-1][0] for b in bins], [sum(v for _, v in b) / len(b) for b in bins]


def losses_of(lines: Sequence[Mapping[str, Any]], key: str) -> Sequence[Mapping[str, Any]]:
    """Return the lines that have this figure: a loss over no tokens is written as 0."""
    return [line for line in lines if line[f"{key}_tokens"]] if key in ("ntp", "mixup") else lines


def _lines(lines: Sequence[Mapping[str, Any]], key: str, name: str, colour: str, **how: Any) -> go.Scatter:
    lines = losses_of(lines, key)
    x, y = curve([line["step"] for line in lines], [line.get(key) for line in lines])
    return go.Scatter(x=x, y=y, name=name, mode=how.pop("mode", "lines"), line={"color": colour, **how})


def losses(view: RunView) -> go.Figure | None:
    """NTP loss of every step, and the held-out NLL."""
    traces = []
    for stage, name in {"reference": "reference", **ARMS}.items():
        lines, colour = view.metrics[stage], COLOURS[stage]
        if lines:
            traces.append(_lines(lines, "ntp", f"{name}, step", colour, width=1))
            if any(line.get("eval_nll") is not None for line in lines):
                held_out = _lines(lines, "eval_nll", f"{name}, held out", colour, mode="lines+markers", width=2)
                traces.append(held_out.update(line={"dash": "dot"}))
    traces = [trace for trace in traces if trace.x]  # MixupOnly has no NTP loss
    before = view.summary.get("eval_nll_before")
    if traces and before is not None:
        last = max(x for trace in traces for x in trace.x)
        base = {"color": COLOURS["base"], "dash": "dash", "width": 1}
        traces.append(go.Scatter(x=[0, last], y=[before] * 2, name="base model, held out", mode="lines", line=base))
    return figure(*traces, x="optimizer step", y="NLL per response token (nats)") if traces else None


def difference(view: RunView) -> go.Figure | None:
    """NTP loss of every step and held-out NLL of the target, minus those of the baseline."""
    lines = []
    for ours, theirs in zip(view.metrics["train"], view.metrics["baseline"], strict=False):
        measured = [key for key in ("ntp", "eval_nll") if ours.get(key) and theirs.get(key)]  # 0: over no tokens
        lines.append({"step": ours["step"], **{f"{key}_apart": ours[key] - theirs[key] for key in measured}})
    steps = _lines(lines, "ntp_apart", "step", COLOURS["base"], width=1)
    held_out = _lines(lines, "eval_nll_apart", "held out", COLOURS["train"], mode="lines+markers")
    return figure(steps, held_out, x="optimizer step", y="difference (nats)") if steps.x or held_out.x else None


def mixup(view: RunView) -> go.Figure | None:
    """Mixup loss of every step, beside NTP."""
    lines = [line for line in view.metrics["train"] if line["mixup_tokens"]]
    if not lines:
        return None
    return figure(
        _lines(lines, "mixup", "Mixup, per mixed token pair", MIXUP_COLOUR, width=1),
        _lines(lines, "ntp", "NTP, per response token", COLOURS["train"], width=1),
        x="optimizer step",
        y="loss (nats)",
    )


def mu_effective(view: RunView) -> go.Figure | None:
    """mu_effective and the share of token pairs of every step."""
    lines = [line for line in view.metrics["train"] if line["mixup_tokens"] and line["ntp_tokens"]]
    if not lines:
        return None
    pairs = [{"step": line["step"], "pairs": line["mixup_tokens"] / line["ntp_tokens"]} for line in lines]
    return figure(
        _lines(lines, "mu_effective", "mu_effective", MIXUP_COLOUR, width=1),
        _lines(pairs, "pairs", "mixed token pairs per response token", COLOURS["train"], width=1),
        x="optimizer step",
        y="",
        yaxis={"rangemode": "tozero"},
    )


def mixing(view: RunView) -> go.Figure | None:
    """What MeasureMixing saw: the cosine of both gradients, Mixup's share of their norm, and the tokens unreached."""
    lines = [line for line in view.metrics["train"] if "mixing_cosine" in line]
    if not lines:
        return None
    names = {
        "mixing_cosine": ("cosine of the NTP and the Mixup gradient", MIXUP_COLOUR),
        "mixing_gradient_share": ("Mixup's share of the gradient norm", COLOURS["train"]),
        "mixing_unreached": ("response tokens that no pair reaches", COLOURS["base"]),
    }
    traces = [_lines(lines, key, name, colour, mode="lines+markers") for key, (name, colour) in names.items()]
    lowest = min([0.0, *(line["mixing_cosine"] for line in lines if line["mixing_cosine"] is not None)])
    return figure(*traces, x="optimizer step", y="", yaxis={"range": [lowest, 1]})


def mixup_by_lambda(view: RunView) -> go.Figure | None:
    """Mixup loss of the token pairs by the larger share, max(lambda, 1 - lambda), as MeasureMixing saw it."""
    lines = view.metrics["train"]
    bins = sorted({key for line in lines for key in line if key.startswith("mixing_loss_")})
    if not bins:
        return None
    seen = [line for line in lines if any(key in line for key in bins)]
    traces = [
        _lines(seen, key, f"{key.removeprefix('mixing_loss_')}% and more", colour, mode="lines+markers")
        for key, colour in zip(bins, GROUPS, strict=False)
    ]
    return figure(*traces, x="optimizer step", y="Mixup loss (nats)")


def rates(view: RunView) -> go.Figure | None:
    """Gradient norm of every step of all stages, and the learning rate of the target."""
    traces = []
    for stage, name in {"reference": "reference", **ARMS}.items():
        if lines := view.metrics[stage]:
            traces.append(_lines(lines, "grad_norm", f"{name}, gradient norm", COLOURS[stage], width=1))
            if stage == "train":
                rate = _lines(lines, "learning_rate", "learning rate", MIXUP_COLOUR, width=1, dash="dot")
                traces.append(rate.update(yaxis="y2"))
    if not traces:
        return None
    log = {"type": "log", "exponentformat": "power"}
    second = {"overlaying": "y", "side": "right", "showgrid": False, "title": {"text": "learning rate"}}
    second |= {"tickformat": ".1e", "tickmode": "auto", "nticks": 5, "rangemode": "tozero", "automargin": True}
    return figure(*traces, x="optimizer step", y="gradient norm (log)", yaxis=log, yaxis2=second)
