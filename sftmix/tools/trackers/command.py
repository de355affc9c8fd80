"""`track`: the metrics of a run, sent to a tracker from its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sftmix.cli.words import read_words
from sftmix.common.errors import ConfigError
from sftmix.tools.trackers import TRACKERS, tracker_class

ABOUT = """Send the metrics of a run to a tracker: every step that the tracker lacks, each once, then the summary.
It reads files only, so it works while a run goes on, after it has ended, and where a live tracker had no network.

  sftmix track runs/first --to tensorboard
  sftmix track runs/first --to wandb --project my-project"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", required=True, choices=TRACKERS, help="the tracker; its package must be installed")
    parser.add_argument("--project", metavar="NAME", help="project of the tracker [sftmix]; tensorboard has none")


def main(argv: Sequence[str]) -> None:
    """Send what the tracker lacks, and say how much that was."""
    given = read_words("track", ABOUT, add_options, argv)
    tracker = tracker_class(given.to)
    if given.project is not None and given.to == "tensorboard":
        raise ConfigError(f"--project is {given.project}, but tensorboard has no projects; leave it out")
    from sftmix.tools.trackers.replay import replay

    options = {} if given.project is None else {"project": given.project}
    print(replay(Path(given.run), tracker(**options)))
