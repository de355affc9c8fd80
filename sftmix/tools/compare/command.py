"""`compare`: variants and seeds from YAML and the command line -> Comparison."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_type_hints

from sftmix.cli.help import help_text, option_docs
from sftmix.cli.parsing import Arguments, OwnOption, changes, parse, print_config, read_arguments
from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.components.selection import All
from sftmix.config import RunConfig
from sftmix.config.layers import Layer
from sftmix.config.merge import ARGS, CLASS, Tree, build, merge
from sftmix.config.values import EXAMPLES
from sftmix.options import as_list
from sftmix.pipeline.identity import Known, reference_inputs
from sftmix.pipeline.stages import stages_needed
from sftmix.tools.compare import Comparison, TableOptions, compare
from sftmix.tools.compare.markdown import markdown, shown_options
from sftmix.tools.compare.plan import OF_THE_TABLE

ABOUT = """Run a table: named variants of one configuration x seeds, then the differences and what they can carry.
The configuration is that of `run`, the base of every variant, with `variants: {NAME: {option: value}}` beside it.
Stages of equal inputs are made once (the reference is trained and scored once); the same command continues a table.

  sftmix compare --config recipe:table5-role --out runs/table5
  sftmix compare --config mine.yaml --seeds [1,2,3] --training.max_steps 50 --out runs/trial --list
  torchrun --nproc_per_node 8 -m sftmix compare --config recipe:table5-role --out runs/table5"""

_ABSENT = object()
_NOT_TRAINED_ON = ("eval", "num_proc", "cache_dir")
"""Options of data that decide nothing about the training rows."""
_METAVARS = {"seeds": "[N, ...]", "baseline": "NAME", "metric": "NAME", "metrics": "[NAME, ...]"}
_METAVARS |= {"contrasts": "[[A, B], ...]", "fresh_reference": ""}


def main(argv: Sequence[str]) -> None:
    """Parse and check every run, then run the table, or only print it (--list, --print_config, --help)."""
    own = [*table_options(), OwnOption("list", bool, False, "", "Show what would be run and what is shared, and exit.")]
    given = read_arguments(argv, own)
    if given.help is not None:
        print(help_text("compare", ABOUT, given.help, own), end="")
        return
    only_list = given.options.pop("list", "false") == "true"
    comparison = comparison_of(given)
    comparison.validate(needs_out=not only_list)
    if only_list:
        print("\n".join(listing(comparison)))
        return
    for warning in comparison.warnings():
        say(warning)
    runs = f"{len(comparison.variants)} variants x {len(comparison.options.seeds)} seeds"
    say(f"compare: {runs}, in {comparison.out}")
    run_table(comparison)


def run_table(comparison: Comparison) -> None:
    """Run the table, write the cards of its models, and print it."""
    from sftmix.tools.sharing.command import write_run_cards

    say("\n" + markdown(compare(comparison)), sys.stdout)
    write_run_cards(*(cell.path for cell in comparison.cells))
    say(f"see table.md, table.csv, cells.csv and table.json in {comparison.out}", sys.stdout)


def comparison_of(given: Arguments) -> Comparison:
    """Read the table of a command line; --print_config ends here."""
    parsed = parse(given, table_options())
    notes, variants = list(parsed.notes), {}
    for name, options in _variants(parsed.own.variants):
        variants[name], tree = _variant(name, options, parsed.tree)
        notes += [f"variant {name}: {note}" for note in changes(parsed.tree, tree, "the variant")]
    notes += [
        f"{option} changes nothing here: every variant sets it to something else"
        for option in _without_effect(given.options, parsed.config, variants.values())
    ]
    for note in notes:
        say(f"note: {note}")
    if given.print_config:
        print_config({**parsed.config.plain(), **vars(parsed.own)})
    of_table = TableOptions(**{f.name: getattr(parsed.own, f.name) for f in dataclasses.fields(TableOptions)})
    return Comparison(out=parsed.config.out, variants=variants, options=of_table)


@cache
def table_options() -> tuple[OwnOption, ...]:
    """List the options of the table beside those of a run: `variants`, and the fields of TableOptions."""
    docs, hints, default = option_docs(TableOptions), get_type_hints(TableOptions), TableOptions()
    variants = "Option: value of each variant; usually in a file."
    return (
        OwnOption("variants", dict, {}, "{NAME: {...}, ...}", variants),
        *(OwnOption(name, hint, getattr(default, name), _METAVARS[name], docs[name]) for name, hint in hints.items()),
    )


def _variants(given: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not given:
        raise ConfigError(
            "variants is missing: `compare` runs named variants of a configuration, for example "
            f"--variants '{EXAMPLES['variants']}', or `variants` in a file of --config; `run` makes a single run"
        )
    for name, options in given.items():
        if name is None or isinstance(name, bool):
            raise ConfigError(
                f"variants: a name is {name!r} to YAML; put it in quotes, or choose another (`no` is False)"
            )
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"variant {name}: {options!r} is not a mapping of options; write `{name}: {{option: value}}`"
            )
        yield str(name), options


def _variant(name: str, options: Mapping[str, Any], base: Tree) -> tuple[RunConfig, Tree]:
    """Return the configuration of one variant: its options over those of the files and the command line."""
    try:
        for key in options:
            if (option := str(key).partition(".")[0].rstrip("+")) in (*OF_THE_TABLE, "config"):
                raise ConfigError(f"{option} is not an option of a variant: it is the table's")
        tree = merge(base, Layer("", dict(options)))
        return build(tree), tree
    except ConfigError as error:
        raise ConfigError(f"variant {name}: {error}") from error


def _without_effect(given: Mapping[str, Any], base: RunConfig, variants: Collection[RunConfig]) -> Iterator[str]:
    """Yield the options of the command line that have another value in every variant."""
    plain, others = base.plain(), [config.plain() for config in variants]
    for option, value in given.items():
        key = option.rstrip("+")
        if key in plain or "." in key:
            mine = _at(plain, key)
            if all(_at(other, key) != mine for other in others):
                yield f"--{option} {' '.join(as_list(value))}"


def _at(values: Any, key: str) -> Any:
    """Return what a plain configuration has under a key, or _ABSENT; of a component its class."""
    for name in key.split("."):
        values = values.get(ARGS, values) if isinstance(values, Mapping) else {}
        values = values.get(name, _ABSENT)
    return values[CLASS] if isinstance(values, Mapping) and CLASS in values else values


def listing(comparison: Comparison) -> list[str]:
    """List the variants, their options, the runs, and the references that runs share; nothing is loaded."""
    cells = comparison.cells
    done = [cell for cell in cells if (cell.path / "train" / "MANIFEST.json").exists()]
    place = comparison.out or "(no --out yet)"
    lines = [f"{len(comparison.variants)} variants x {len(comparison.options.seeds)} seeds in {place}"]
    width = max(map(len, comparison.variants))
    lines += [f"  {name:<{width}}  {shown_options(comparison.options_of(name))}" for name in comparison.variants]
    needing = [cell for cell in cells if "reference" in stages_needed(comparison.variants[cell.variant], "train")]
    first = {cell.variant: cell for cell in reversed(needing)}
    configs = {name: cell.config() for name, cell in first.items()}  # whose seeds differ in `seed` alone
    references = len({_reference_of(dataclasses.replace(configs[c.variant], seed=c.seed)) for c in needing})
    # A selector may draw by the seed or not, which only its rows can tell.
    selected = any(not isinstance(comparison.variants[cell.variant].selector, All) for cell in needing)
    most = " at most" if selected else ""
    lines += comparison.warnings()
    lines.append(f"runs: {len(cells)}, of which {len(done)} are done; trainings of the target: {len(cells)} at most")
    lines.append(f"references: {references}{most}, used by {len(needing)} runs")
    return lines


def _reference_of(config: RunConfig) -> str:
    """Return what decides the reference of a run: the inputs of the stage, and what stands for rows and weights."""
    rows = {key: value for key, value in vars(config.data).items() if key not in _NOT_TRAINED_ON}
    drawn_by = config.seed if config.data.seed is None else config.data.seed
    rows["seed"] = drawn_by if config.data.drawn else None
    selected = None if isinstance(config.selector, All) else [config.selector.spec(), config.seed]
    if config.reference.trains:
        inputs = reference_inputs(Known(config))
    else:  # the files of one that is read are not looked for
        inputs = {**config.reference.spec(), "by": [config.training.precision, config.model.attention]}
    return json.dumps([rows, config.model.path, selected, inputs], sort_keys=True, default=lambda unknown: None)
