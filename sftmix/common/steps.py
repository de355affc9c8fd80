"""metrics.jsonl: what a stage wrote of its optimizer steps, one line for each."""

from pathlib import Path
from typing import Any

from sftmix.common.files import read_object


def read_steps(stage: Path) -> list[dict[str, Any]]:
    """Return the lines of a stage's metrics.jsonl; none without the file.

    The last line may be torn, by a killed process or because it is being written: it is left out. Raises
    DifferenceError for another line that is not as a run writes it.
    """
    path = stage / "metrics.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [
            read_object(line, f"{path}, line {number}", step=int)
            for number, line in enumerate(file, 1)
            if line.endswith((b"}", b"\n"))
        ]
