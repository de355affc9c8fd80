"""TensorBoard: event files in the run directory, one event for each row."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.tools.trackers.base import Tracker
from sftmix.tools.trackers.rows import STAGES, Row


class TensorBoard(Tracker):
    """Event files in RUN/trackers/tensorboard, for `tensorboard --logdir RUN`."""

    package = client = "tensorboard"

    def open(self, run: Path, config: Mapping[str, Any]) -> int:
        import yaml
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        there, self._figures, begun = self._read(self.folder(run))
        self._writer = EventFileWriter(str(self.folder(run)))
        if not begun:
            self._add(0, time.time(), [_text("config", yaml.safe_dump(dict(config), sort_keys=False))])
        return there

    def write(self, row: Row) -> None:
        # One event for the whole row: it is in the file or not, wherever a process ends.
        self._add(row.step, row.time, [_scalar(name, value) for name, value in row.values.items()])

    def summarise(self, figures: Mapping[str, float]) -> None:
        values = [_scalar(f"summary/{name}", value) for name, value in figures.items()]
        new = [value for value in values if self._figures.get(value.tag) != value.simple_value]
        if new:
            self._add(0, time.time(), new)

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, moment: float, values: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(wall_time=moment, step=step, summary=Summary(value=values)))

    @staticmethod
    def _read(folder: Path) -> tuple[int, dict[str, float], bool]:
        """Return the number of rows in the event files, the figures of the summary, and whether there is anything."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        rows, figures, begun = 0, dict[str, float](), False
        for path in sorted(folder.glob("events.out.tfevents.*")):
            for event in LegacyEventFileLoader(str(path)).Load():
                tags = [value.tag for value in event.summary.value]
                begun = begun or bool(tags)
                rows += any(tag.partition("/")[0] in STAGES for tag in tags)
                figures |= {v.tag: v.simple_value for v in event.summary.value if v.tag.startswith("summary/")}
        return rows, figures, begun


def _scalar(tag: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def _text(tag: str, text: str) -> Any:
    """Return a text for TensorBoard's text tab, shown as it is."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    block = "\n".join(f"    {line}" for line in text.splitlines())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[block.encode()], tensor_shape=shape)
    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=tag, metadata=about, tensor=tensor)
