"""`preview`: the first rows as the model will see them."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftmix.cli.parsing import configuration
from sftmix.cli.say import say
from sftmix.config import RunConfig
from sftmix.disk.places import unwritable
from sftmix.words.errors import ConfigError
from sftmix.words.shown import counted

_ABOUT = """Show rows as the model will see them: text, token ids, labels, the mask in colour, and dropped rows.
Nothing is trained, and nothing but the table of --bad is written; no --out is needed.

  sftmix preview --model.path NAME --data.train rows.json --rows 5
  sftmix preview --model.path NAME --data.train rows.json --bad bad.csv"""


@dataclass(kw_only=True)
class PreviewOptions:
    rows: int = 3
    """How many rows to show."""
    bad: str | None = None
    """FILE: a table (CSV) with a line for each reason why a row is bad, dropped, cut or not wholly read."""
    no_color: bool = False
    """Plain text; also without a terminal, or with NO_COLOR set."""


def main(name: str, argv: Sequence[str]) -> None:
    """Print the rows; `argv` are the words after the command's name."""
    config, values = configuration(name, _ABOUT, argv, PreviewOptions, needs_out=False)
    if values.rows < 1:
        raise ConfigError(f"rows is {values.rows}; allowed: at least 1")
    from sftmix.tools.runs.start import check_names_given

    check_names_given(config)
    # no-color.org: NO_COLOR counts with any value but an empty one.
    color = sys.stdout.isatty() and not values.no_color and not os.environ.get("NO_COLOR")
    if values.bad is None:
        print(preview(config, values.rows, color=color))
        return
    if problem := unwritable(values.bad):
        raise ConfigError(f"--bad: {values.bad} {problem}")
    from sftmix.data.report import every_case
    from sftmix.tools.preview.cases import write_cases

    with every_case() as cases, tempfile.TemporaryDirectory() as cache:  # all rows are read, and none from a cache
        data = replace(config.data, skip_bad=True, cache_dir=cache)
        try:
            print(preview(replace(config, data=data), values.rows, color=color))
        finally:
            count = write_cases(Path(values.bad), cases)
            say(f"{counted(count, 'line')} in {values.bad}")


def preview(config: RunConfig, rows: int, *, color: bool) -> str:
    """Return a text of the first selected rows as the model sees them, and of dropped rows; nothing is written."""
    from sftmix.pipeline.rows import read_rows
    from sftmix.ranks.world import World
    from sftmix.tools.preview.text import render_preview

    _, shown = read_rows(config, World())
    return render_preview(shown.data, shown.encoder, range(min(rows, len(shown.data.train))), color=color)
