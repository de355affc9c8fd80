"""A planned table whose runs have begun to train, for figures that are written down in a test."""

from pathlib import Path
from typing import Any

import yaml

from sftmix.components.objectives import NTP
from sftmix.config import RunConfig
from sftmix.disk.files import write_json
from sftmix.options import ModelOptions
from sftmix.tools.compare import Comparison, TableOptions


def table_of(directory: Path, names: str, seeds: int, **options: Any) -> Comparison:
    """Variants of these names, whose runs have begun to train."""
    variants = {name: RunConfig(model=ModelOptions(path="m"), objective=NTP()) for name in names}
    table = TableOptions(**{"seeds": list(range(1, seeds + 1)), "metric": "x", **options})
    comparison = Comparison(out=str(directory), variants=variants, options=table)
    for cell in comparison.cells:
        write_json(cell.path / "train" / "inputs.json", {})
    configured(comparison)
    return comparison


def configured(comparison: Comparison) -> None:
    """Write the configuration of each run, as a run does when it begins."""
    for cell in comparison.cells:
        (cell.path / "config.yaml").write_text(yaml.safe_dump(cell.plain), encoding="utf-8")
