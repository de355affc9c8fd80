"""`report`: the page of a run, or of a table."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from sftmix.disk.files import TABLE, naming_damage
from sftmix.disk.places import is_there, unwritable
from sftmix.tools.runs.read import Reading, refuse_no_run
from sftmix.words.errors import ConfigError

ABOUT = """Write one HTML page that shows what the method saw in the data and what came out; it needs no network.
For a run it also writes report/examples.parquet: every example with its text, confidence, group and losses; with --to
x.html it is x.examples.parquet.

  sftmix report runs/first
  sftmix report runs/first --score          the loss of every training example before and after, in the table
  sftmix report runs/table5 --margin 0.01   the differences of a table, seed by seed

It needs plotly and scikit-learn: pip install -e '.[report]' in the checkout."""


@dataclass
class Options(Reading):
    run: str
    """RUN: finished run directory, or a table's"""
    _: KW_ONLY
    to: str | None = None
    """FILE: the page [RUN/report/report.html]"""
    map: int = 400
    """N: examples on the map of hidden states of a run, half from each end; 0 loads no model [%(default)s]"""
    score: bool = False
    """pass all training examples through the base model and the trained ones, for the table"""
    margin: float | None = None
    """X: of a table: shade the differences from -X to X, which do not matter"""


def main(args: Options) -> None:
    """Write the page and say where it is."""
    run = Path(args.run)
    _check(args, run)
    try:
        from sftmix.tools.report.write import write_report
    except ModuleNotFoundError as error:  # plotly or sklearn, which the extra has
        raise ConfigError(
            f"report needs {error.name}, which is not installed: pip install -e '.[report]' in the checkout"
        ) from None
    with naming_damage(f"a file of {run}"):
        for path in write_report(run, args.to, map_size=args.map, score_all=args.score, margin=args.margin):
            print(path)


def _check(args: Options, run: Path) -> None:
    """Raise ConfigError for what is certain of options and directories, before plotly and torch are imported."""
    if args.map and args.map < 10:
        raise ConfigError(f"--map is {args.map}; allowed: 0, for no map, or 10 and above")
    table = is_there(run / TABLE)
    if args.margin is not None and not (table and args.margin > 0):
        raise ConfigError(f"--margin is {args.margin:g}; it is above 0, and for the report of a table")
    if not table:
        refuse_no_run(run)
    place = args.to or run / "report"
    if problem := unwritable(place, folder=not args.to):
        raise ConfigError(f"{place} {problem}: --to FILE")
