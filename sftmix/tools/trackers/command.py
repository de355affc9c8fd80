"""`track`: the metrics of a run, to a tracker."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from sftmix.components.component import missing_package
from sftmix.tools.runs.output import flatten
from sftmix.tools.runs.read import read_json_if_there, refuse_no_run
from sftmix.tools.trackers import TRACKERS
from sftmix.words.errors import ConfigError

ABOUT = """Send the metrics of a run to a tracker: every step that the tracker lacks, each once, then the summary.
It reads files only, so it works while a run goes on, after it has ended, and where a live tracker had no network.

  sftmix track runs/first --to tensorboard
  sftmix track runs/first --to wandb --project my-project"""


@dataclass
class Options:
    run: str
    """RUN: run directory"""
    _: KW_ONLY
    to: Literal["mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
    """the tracker; its package must be installed"""
    project: str = "sftmix"
    """NAME: project of the tracker [%(default)s]; tensorboard has none"""


def main(args: Options) -> None:
    """Send the rows that a tracker lacks of a run, and the figures of its summary; say how many these were.

    The run may be finished, interrupted, or going on in another process. Raises ConfigError for what is no run and for
    a package that is missing, InUseError if another process sends this run to the same client.
    """
    run, tracker = Path(args.run).resolve(), TRACKERS[args.to](project=args.project)
    refuse_no_run(run)
    if problem := missing_package(tracker):
        raise ConfigError(f"--to {tracker.client} {problem}")
    try:
        tracker.begin(run)
        sent = tracker.send()
        if summary := read_json_if_there(run / "summary.json"):
            figures = flatten({"summary": summary})
            # stages.train.steps is sent as summary/stages/train/steps.
            tracker.summarise({name.replace(".", "/"): value for name, value in figures if value == value})  # null: NaN
    finally:
        tracker.end()
    others = ", which had the others" * (sent < tracker.rows)
    print(f"{run}: {sent} of {tracker.rows} steps sent to {tracker.client}{others}")
