"""`track`: the metrics of a run, sent to a tracker from its files alone."""

import argparse
from pathlib import Path

from sftmix.common.errors import ConfigError
from sftmix.common.figures import flatten
from sftmix.common.files import read_json
from sftmix.components.base import missing_package
from sftmix.pipeline.directory import refuse_no_run
from sftmix.tools.trackers import TRACKERS

ABOUT = """Send the metrics of a run to a tracker: every step that the tracker lacks, each once, then the summary.
It reads files only, so it works while a run goes on, after it has ended, and where a live tracker had no network.

  sftmix track runs/first --to tensorboard
  sftmix track runs/first --to wandb --project my-project"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", required=True, choices=TRACKERS, help="the tracker; its package must be installed")
    parser.add_argument(
        "--project", default="sftmix", metavar="NAME", help="project of the tracker [%(default)s]; tensorboard has none"
    )


def main(args: argparse.Namespace) -> None:
    """Send the rows that a tracker lacks of a run, and the figures of its summary; say how many these were.

    The run may be finished, interrupted, or going on in another process. Raises ConfigError for what is no run and for
    a package that is missing, InUseError if another process sends this run to the same client.
    """
    run, tracker = Path(args.run), TRACKERS[args.to](project=args.project)
    refuse_no_run(run)
    if problem := missing_package(tracker):
        raise ConfigError(f"--to {tracker.client} {problem}")
    try:
        tracker.begin(run)
        sent = tracker.send()
        if (run / "summary.json").exists():
            figures = flatten({"summary": read_json(run / "summary.json")})
            tracker.summarise({name.replace(".", "/"): value for name, value in figures if value == value})  # null: NaN
    finally:
        tracker.end()
    print(f"{run}: {sent} of {tracker.rows} steps sent to {tracker.client}, which had the others")
