"""`compare`: variants and seeds from YAML and the command line -> Comparison."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftmix.cli.help import help_text
from sftmix.cli.parsing import Arguments, parse, print_config, read_arguments
from sftmix.cli.say import for_terminal, say, wrapped
from sftmix.config.merge import build, merge
from sftmix.config.schema import options_of
from sftmix.tools.compare import Comparison, TableOptions, compare
from sftmix.tools.compare.plan import OF_THE_TABLE, is_over, of_variants, shown_options
from sftmix.tools.compare.statistics import seeds_needed
from sftmix.tools.compare.written import markdown
from sftmix.tools.runs.output import rendered
from sftmix.words.differing import differing
from sftmix.words.errors import ConfigError
from sftmix.words.shown import counted

ABOUT = """Run a table: named variants of one configuration x seeds, then the differences and what they can carry.
The options of `run` are the base of every variant, with `variants: {NAME: {option: value}}` beside it.
Stages of equal inputs are made once (the reference is trained and scored once); the same command continues a table.

  sftmix compare --config recipe:table5-role --out runs/table5
  sftmix compare --config mine.yaml --seeds [1,2,3] --training.max_steps 50 --out runs/trial --list
  torchrun --nproc_per_node 8 -m sftmix compare --config recipe:table5-role --out runs/table5"""


@dataclass(kw_only=True)
class CompareOptions(TableOptions):
    variants: dict[str, Any] = field(default_factory=dict)
    """{NAME: {option: value}} of each variant; usually in a file."""
    list: bool = False
    """Show what would be run, and exit."""


def main(name: str, argv: Sequence[str]) -> None:
    """Parse and check every run, then run the table, or only print it (--list, --print_config, --help)."""
    arguments = read_arguments(argv, CompareOptions)
    if arguments.help is not None:
        print(help_text(name, ABOUT, arguments.help, CompareOptions), end="")
        return
    # --list, --list true and --list yes are one value; any other word, as in `--list runs/role`, is refused.
    only_list = merge({}, {"list": arguments.options.pop("list", False)}, options_of(CompareOptions))["list"]
    from sftmix.tools.runs.start import doubts  # not for --help

    comparison = comparison_of(arguments)
    comparison.validate()
    for doubt in of_variants({variant: doubts(config) for variant, config in comparison.variants.items()}):
        say(doubt)
    place = sys.stdout if only_list else sys.stderr  # above a table it goes to stderr: stdout has the table
    say(for_terminal(listing(comparison), place), place)
    if not only_list:
        run_table(comparison)


def run_table(comparison: Comparison) -> None:
    """Run the table, write the cards of its models, and print it."""
    from sftmix.tools.sharing.command import write_run_cards

    columns = shutil.get_terminal_size().columns
    say(wrapped("\n" + markdown(compare(comparison), columns), columns), sys.stdout)
    write_run_cards(*(cell.path for cell in comparison.cells))
    say(f"see table.md and table.json in {comparison.out}", sys.stdout)


def listing(comparison: Comparison) -> str:
    """List the variants with their options, and the runs; nothing is loaded."""
    contrasts = len(comparison.contrasts)
    return rendered(
        "compare/listing.txt",
        table=comparison,
        done=sum(is_over(cell.path) for cell in comparison.cells),
        seeds=len(comparison.options.seeds),
        contrasts=contrasts,
        needed=seeds_needed(max(contrasts, 1)),
        counted=counted,
        shown_options=shown_options,
    )


def comparison_of(arguments: Arguments) -> Comparison:
    """Read the table of a command line; --print_config ends here."""
    config, tree, values = parse(arguments, CompareOptions)
    table, base = vars(values), config.as_dict()
    if table.pop("list"):
        raise ConfigError("list true is for the command line (--list): a file would show its table and never run it")
    variants = {}
    for name, given in table.pop("variants").items():
        options = given or {}  # `NTP:` with nothing behind it is null in YAML: the base itself
        try:
            if not isinstance(options, Mapping):
                raise ConfigError(f"{options!r} is not a mapping of options; write `{name}: {{option: value}}`")
            for key in OF_THE_TABLE & options.keys():
                raise ConfigError(f"{key} is not an option of a variant: it is the table's")
            variants[str(name)] = build(merge(tree, options))  # `0.4: {...}` has a number as its name
        except ConfigError as error:
            raise ConfigError(f"variant {name}: {error}") from error
    # As with a table's own compare.yaml, in which every variant has all its options.
    changed = [{key for key, *_ in differing(base, variant.as_dict())} for variant in variants.values()]
    for option in arguments.options:
        if changed and all(option.rstrip("+") in options for options in changed):  # --data.train+ adds to data.train
            say(f"note: --{option} changes nothing here: every variant sets it to something else")
    comparison = Comparison(out=config.out or "", variants=variants, options=TableOptions(**table))
    if arguments.print_config:
        print_config({**base, **table, "variants": comparison.plain_variants()})
    return comparison
