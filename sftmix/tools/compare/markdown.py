"""The table as people read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from sftmix.common.figures import unit_of
from sftmix.tools.compare.statistics import EXACT_UP_TO, MIN_SEEDS, smallest_p


def markdown(table: Mapping[str, Any]) -> str:
    """Return table.md: the metric, the contrasts, further figures, and notes on the limits of the table."""
    variants = table["variants"]
    seeds = table["options"]["seeds"]
    parts = [f"# {len(variants)} variant{_s(variants)} x {len(seeds)} seed{_s(seeds)}"]
    if not table["complete"]:
        done = f"{table['runs_done']} of {table['runs']} runs are done"
        parts.append(f"**INCOMPLETE: {done}.** Intervals, what is detectable and results come at the end.")
    parts += [_grid(_main_rows(table)), f"## Contrasts on {table['metric']}", _grid(_contrast_rows(table))]
    parts.append("\n".join(f"- {note}" for note in _notes(table)))
    further = [name for name in table["shown"] if name != table["metric"]]
    if further:
        about = f"Mean ± standard deviation over seeds; percentages are to {table['baseline']}, paired by seed."
        parts += ["## Further figures", about, _grid(_further_rows(table, further))]
    parts += ["## Variants", _grid(_variant_rows(table)), _versions(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _s(values: Sized) -> str:
    return "s" * (len(values) != 1)


def number(value: float | None, *, like: float | None = None) -> str:
    """Write a number with the decimals that suit its size, or the size of `like`, the number beside it."""
    if value is None:
        return "-"
    size = abs(value if like is None else like)
    if size >= 100:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    return f"{value:.4f}" if size >= 1e-2 or not size else f"{value:.2g}"


def _count(found: int, runs: int) -> str:
    """Return the number of seeds with a figure, and of how many if some lack it."""
    return str(found) if found == runs else f"{found} of {runs}"


def _mean(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    mean, sd = figures["mean"], figures["sd"]
    if mean == int(mean) and not sd:  # a count that is the same at all seeds
        return f"{mean:,.0f}"
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd, like=mean)}"


def _main_rows(table: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    metric, baseline = table["metric"], table["baseline"]
    yield ("variant", "seeds", f"{metric}, mean ± sd", f"minus {baseline}, paired by seed")
    for name, variant in table["variants"].items():
        figures = variant["metrics"].get(metric)
        off = "baseline" if name == baseline else "-"
        if figures and figures.get("difference") is not None:
            spread = figures["difference_sd"]
            off = f"{figures['difference']:+.4f}" + ("" if spread is None else f" ± {spread:.4f}")
        runs = len(variant["runs"])
        yield (name, _count((figures or {"seeds": 0})["seeds"], runs), _mean(figures), off)


def _contrast_rows(table: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    if table["contrasts"]:
        yield (
            *("contrast", "seeds", "trained on", "difference", "95% interval"),
            *("p", "p (Holm)", "detectable", "result"),
        )
    for c in table["contrasts"]:
        interval = "-" if c["interval"] is None else f"[{c['interval'][0]:+.4f}, {c['interval'][1]:+.4f}]"
        off = "-" if c["mean"] is None else f"{c['mean']:+.4f}"
        p_values = (number(c["p"]), number(c["p_holm"]))
        name = f"{c['ours']} − {c['theirs']}"
        seeds = _count(len(c["seeds"]), min(len(table["variants"][c[side]]["runs"]) for side in ("ours", "theirs")))
        found = (off, interval, *p_values, number(c["smallest_effect"]), c["verdict"])
        yield (name, seeds, _trained_on(c), *found)


def _trained_on(contrast: Mapping[str, Any]) -> str:
    """Return in words which training data the two sides share."""
    if contrast["same_order"]:
        return "same order"
    return {True: "same rows", False: "other rows", None: "-"}[contrast["same_rows"]]


def _notes(table: Mapping[str, Any]) -> Iterator[str]:
    seeds, contrasts = len(table["options"]["seeds"]), table["contrasts"]
    if unit := unit_of(table["metric"]):
        yield f"{table['metric']}: {unit}."
    yield from _without_value(table)
    if not contrasts:
        return
    if seeds == 1:
        yield "One seed: there is no standard deviation, and nothing is tested."
    else:
        yield (
            f"p: {'exact' if seeds <= EXACT_UP_TO else 'sampled'} two-sided sign-flip test over the seeds; "
            f"{seeds} seeds can give no p below {smallest_p(seeds):.2g}. "
            f"Holm over the {len(contrasts)} contrast{_s(contrasts)}."
        )
    if seeds < MIN_SEEDS:
        needed = table["seeds_needed"]
        what = f"with {len(contrasts)} contrasts " if len(contrasts) > 1 else ""
        yield f"**Nothing here is called significant: {what}that takes {needed} seeds, and these are {seeds}.**"
    elif seeds < table["seeds_needed"]:
        yield (
            f"**With {len(contrasts)} contrasts no p can be below 0.05 after Holm: "
            f"that takes {table['seeds_needed']} seeds, and these are {seeds}.**"
        )
    yield from _about_training(contrasts)
    for c in (c for c in contrasts if c["same_training"]):
        yield (
            f"**{c['ours']} and {c['theirs']} are the same training: the options in which they differ decide nothing "
            "about it. The difference says nothing.**"
        )
    yield from _about_intervals(contrasts)
    if any(c["smallest_effect"] is not None for c in contrasts):
        yield (
            "detectable: the true difference that so many seeds call different four times in five (by this very test, "
            f"Holm over {len(contrasts)}), if differences are normal with the spread seen here; few seeds tell it only "
            "roughly."
        )
    yield _what_seeds_share(table)


def _about_training(contrasts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    meaning = {
        "same order": "both sides take the same examples in every step",
        "same rows": (
            "the same examples in another order, which is then part of the difference (pairs decide the order, as do "
            "batch size and length; `pairing: auto` pairs nothing for an objective that does not mix)"
        ),
        "other rows": "the examples are not the same either",
    }
    found = {_trained_on(c) for c in contrasts}
    said = [f'"{words}", {what}' for words, what in meaning.items() if words in found]
    if said:
        yield f"trained on, at each seed: {'; '.join(said)}."


def _about_intervals(contrasts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for kind in sorted({c["interval_over"] for c in contrasts} - {None}):
        if kind == "examples":
            yield "95% interval: Student's t over examples, for these very runs; it knows nothing of other seeds."
            continue
        lacking = "" if "examples" in kind else " (the runs hold no per-example results of one set of held-out rows)"
        yield (
            f"95% interval: Student's t over {kind}{lacking}, for normal differences, not corrected for several "
            "contrasts. The result is by p alone."
        )


def _without_value(table: Mapping[str, Any]) -> Iterator[str]:
    for name, variant in table["variants"].items():
        if variant["no_value"]:
            which = f"seed{_s(variant['no_value'])} {', '.join(map(str, variant['no_value']))}"
            yield (
                f"**{name}: no finite {table['metric']} at {which}. Such runs (diverged, or not measured) are in no "
                "mean and no contrast here, which flatters a variant that diverges.**"
            )


def _what_seeds_share(table: Mapping[str, Any]) -> str:
    own: dict[str, list[str]] = {"data": [], "eval": [], "reference": []}
    for name, variant in table["variants"].items():
        for key in (key for key, same in variant["same_at_all_seeds"].items() if not same):
            own[key].append(name)
    if not any(own.values()):
        return (
            "Reference and held-out rows are the same at all seeds; the seeds vary the training, and the split where "
            "it is drawn (RandomSplit, LengthMatched)."
        )
    words = {"data": "training rows", "eval": "held-out rows", "reference": "a reference"}
    parts = [f"{words[key]} ({', '.join(names)})" for key, names in own.items() if names]
    return f"Each seed has its own {' and '.join(parts)}; what else is not trained is the same at all seeds."


def _further_rows(table: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sequence[str]]:
    variants = table["variants"]
    yield ("figure", *variants)
    for name in names:
        yield (name, *(_further(variant, name) for variant in variants.values()))


def _further(variant: Mapping[str, Any], name: str) -> str:
    figures, runs = variant["metrics"].get(name), len(variant["runs"])
    if figures is None:
        return _mean(None)
    lacking = f" ({_count(figures['seeds'], runs)} seeds)" if figures["seeds"] < runs else ""
    relative = f" ({figures['relative']:+.1%})" if figures.get("relative") is not None else ""
    return _mean(figures) + lacking + relative


def _variant_rows(table: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    yield ("variant", "options that are not the same in all")
    for name, variant in table["variants"].items():
        yield (name, shown_options(variant["options"]))


def shown_options(options: Mapping[str, object]) -> str:
    """Write options as `key: value; ...`."""
    return "; ".join(f"{key}: {_value(value)}" for key, value in options.items()) or "(none)"


def _value(value: object) -> str:
    """Write a plain value; a component as its class and options, a group as its options that are set."""
    if isinstance(value, Mapping):
        args = value.get("init_args") or {} if "class_path" in value else value
        listed = ", ".join(f"{k}={_value(v)}" for k, v in args.items() if v is not None)
        return f"{value.get('class_path', '').rpartition('.')[2]}({listed})"
    return value if isinstance(value, str) else json.dumps(value)


def _versions(table: Mapping[str, Any]) -> str:
    own = ", ".join(f"{name} {version}" for name, version in table["versions"].items() if version)
    return f"Trained by sftmix {', '.join(table['trained_by'])}. This table: {own}."


def _grid(rows: Iterator[Sequence[str]]) -> str:
    """Return a Markdown table, its columns aligned for people who read the text."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    if not lines:
        return ""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    shown = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:]])
