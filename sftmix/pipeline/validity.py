"""Whether a stage of a run directory is valid for its inputs, or refused.

A stage directory holds `inputs.json` (what it is made from, written when it starts) and, once it is done, MANIFEST.json
with the hashes of its outputs. A rerun reuses a finished stage whose inputs are the same, continues an unfinished one,
and refuses both when the inputs differ: nothing is ever recomputed over other work.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftmix.disk.files import MANIFEST, read_json, verify_directory
from sftmix.pipeline.releases import completed
from sftmix.words.differing import differing
from sftmix.words.errors import ConfigError, DifferenceError

Inputs = Mapping[str, Any]
"""What a stage is made from, JSON-able; a value that is not known yet is UNKNOWN."""


class _Unknown:
    """A value that is not known yet: each attribute and call gives UNKNOWN again, and it equals anything."""

    def __getattr__(self, name: str) -> "_Unknown":
        return self

    def __call__(self, *asked: Any) -> "_Unknown":
        return self

    # "fp32" == UNKNOWN as well: str leaves the answer to this side.
    def __eq__(self, other: object) -> bool:
        return True


UNKNOWN: Any = _Unknown()
_EDITED = re.compile(r"\w*files\.(.+): '[0-9a-f]{64}' -> '[0-9a-f]{64}'")
"""The line of a class or file whose content differs: selector_files.my_lab.Mine: '1a...' -> '2b...'."""
ADOPTED = "adopted.json"
"""In a stage that was made by another run: where that run's stage is, relative to the stage directory."""


def is_finished(stage: Path, *, weights: bool = True) -> bool:
    """Return True if a stage is finished; raise DifferenceError if an output of it is not what its manifest says.

    weights  False: leave out its exported model, for those who read its figures alone
    """
    if not (stage / MANIFEST).exists():
        return False
    if problem := verify_directory(stage, without=None if weights else "model", within=stage.parent):
        raise DifferenceError(f"{stage}: {problem}; restore it, or move {stage} away")
    return True


def refuse_stage(directory: Path, inputs: Inputs, words: Mapping[str, str] = {}) -> None:
    """Raise ConfigError for a stage that was made, or begun, from other inputs.

    If it holds no work yet, other inputs may replace a first attempt's: `dynamics.parquet` in the directory of the
    confidence is the reference's work.

    words  name of an input whose value is a hash -> what the message says if it differs
    Raises DifferenceError for a finished stage that does not say what it was made from.
    """
    if (directory / MANIFEST).exists() and not (directory / "inputs.json").exists():
        raise DifferenceError(
            f"{directory}: it is finished, and its inputs.json is gone: bring it back, or move it away"
        )
    work = [path for path in directory.glob("*") if path.name not in ("inputs.json", "dynamics.parquet")]
    # An empty file is no work: metrics.jsonl is opened before the first step.
    if not (directory / "inputs.json").exists() or all(path.is_file() and not path.stat().st_size for path in work):
        return
    different = differences(read_json(directory / "inputs.json"), inputs)
    # "model: '1a' -> '2b'" is said in words, "training.epochs: 3 -> 2" as it is
    if said := "; ".join(words.get(line.partition(": ")[0], _EDITED.sub(r"\1 was edited", line)) for line in different):
        raise ConfigError(f"{directory}: was made with other inputs: {said}. Use another --out, or the old settings")


def differences(old: Any, new: Any) -> list[str]:
    """List the differences of the inputs of two stages as `key: old -> new`; `new` may hold UNKNOWN.

    Two releases may have recorded them: an option that one of them did not have yet is there at its default.
    """
    pair = completed(old, new), completed(new, old)
    return [f"{key}: {_shown(was)} -> {_shown(now)}" for key, was, now in differing(*pair)]


def _shown(value: Any) -> str:
    """Show a value; of a component, whose options another class may not have, the class."""
    # splitter: Median -> Quantile
    return value["class_path"] if isinstance(value, Mapping) and "class_path" in value else repr(value)


def origin(directory: Path) -> Path:
    """Return the directory that a stage was adopted from, or the stage's own if it was made here."""
    if not (directory / ADOPTED).exists():
        return directory
    return Path(os.path.normpath(directory / read_json(directory / ADOPTED, **{"from": str})["from"]))
