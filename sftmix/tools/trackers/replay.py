"""The replay of a run to a tracker, from its files alone: `sftmix track`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sftmix.common.errors import ConfigError
from sftmix.common.figures import flatten
from sftmix.common.files import read_json
from sftmix.tools.trackers.base import Tracker
from sftmix.tools.trackers.rows import STAGES


def replay(run: Path, tracker: Tracker) -> str:
    """Send the rows that a tracker lacks of a run, and the figures of its summary; return a line that says so.

    The run may be finished, interrupted, or going on in another process. Raises ConfigError if there is nothing to
    send, and InUseError if another process sends this run to the same client.
    """
    if not any((run / stage / "metrics.jsonl").exists() for stage in STAGES):
        raise ConfigError(f"{run} has no metrics to send: none of {', '.join(STAGES)} has a metrics.jsonl")
    if tracker.package is not None and importlib.util.find_spec(tracker.package) is None:
        raise ConfigError(f"--to {tracker.client} needs the package {tracker.package}: pip install {tracker.package}")
    tracker.begin(run)
    try:
        sent, total = tracker.send(), tracker.rows
        summary = run / "summary.json"
        if summary.exists():
            numbers = {k: v for k, v in flatten(read_json(summary)) if v == v}  # not NaN, which stands for null
            tracker.summarise({name.replace(".", "/"): value for name, value in numbers.items()})
    finally:
        tracker.end()
    return f"{run}: {sent} of {total} steps sent to {tracker.client}, which had the others"
