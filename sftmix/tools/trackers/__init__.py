"""Trackers, which show the metrics of runs: as callbacks (`--callbacks+ sftmix.tools.trackers.WandB`), or by `track`.

What is sent is metrics.jsonl, line by line, so that both ways give the same. Nothing else of this package imports the
room, and each client is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftmix.tools.trackers.base import Tracker

_MODULES = {"SwanLab": "swanlab", "TensorBoard": "tensorboard", "Trackio": "trackio", "WandB": "wandb"}
TRACKERS = {module: name for name, module in sorted(_MODULES.items())}
"""The name that `sftmix track --to` takes -> the class."""

__all__ = ["TRACKERS", *_MODULES]


def tracker_class(name: str) -> type[Tracker]:
    """Return the class of a tracker by the name of its client, as `sftmix track --to` takes it."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), TRACKERS[name])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return tracker_class(_MODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
