"""The benchmarks of a run on its page: the table that `sftmix evaluate` left in the run directory."""

from __future__ import annotations

from pathlib import Path

from sftmix.common.files import read_json
from sftmix.tools.report.page import Section

TABLE = Path("evaluation") / "table.json"


def benchmarks(run: Path) -> list[Section]:
    """Return the section of the benchmarks; none where nothing was evaluated."""
    if not (run / TABLE).exists():
        return []
    found = read_json(run / TABLE)
    return [Section("benchmarks", "Benchmarks", table=found["table"], notes=found["sentences"])]
