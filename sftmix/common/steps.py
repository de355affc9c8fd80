"""metrics.jsonl: what a stage wrote of its optimizer steps, one line for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_steps(stage: Path) -> list[dict[str, Any]]:
    """Return the lines of a stage's metrics.jsonl; none without the file.

    The last line may be torn, by a killed process or because it is being written: it is left out.
    """
    path = stage / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
