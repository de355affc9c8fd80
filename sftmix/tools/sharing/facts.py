"""The files of a finished run -> what a card says of it. Directories of this machine are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sftmix.common.files import read_json
from sftmix.common.hub import hub_name
from sftmix.common.names import is_there
from sftmix.common.steps import read_steps
from sftmix.config import RunConfig
from sftmix.config.read import read_finished
from sftmix.data.sources import COMPRESSED, READERS
from sftmix.model.paths import model_place
from sftmix.options import as_list
from sftmix.pipeline.directory import check_finished
from sftmix.pipeline.finished import refuse_no_run

_OF_EACH = ("seed", "selector", "optimizer")
_OF_THE_STAGE = {
    "train": ("objective", "reference", "confidence", "splitter", "pairing", "perturbation"),
    "baseline": (),
    "reference": ("reference", "confidence"),
}
"""Components that decide the result of a stage, beside those of each."""
_OF_THE_MACHINE = {"parallel", "shard_group_size", "compile", "activation_checkpointing", "chunk_size", "padding_free"}
_OF_THE_MACHINE |= {"timeout"}
_OF_THE_DATA = ["format", "columns", "template", "special_tokens", "max_length", "multi_turn", "packing", "skip_bad"]
_OF_THE_DATA += ["eval", "eval_fraction", "take", "seed", "limit"]

_OF_FILES = {*READERS, *COMPRESSED, ".tsv", ".arrow", ".jinja"}
"""Endings by which a text with a slash is a path, and no hub id."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run from its directory.

    summary  summary.json; empty before the run has come that far
    """

    run: Path
    config: RunConfig
    summary: Mapping[str, Any]

    @property
    def base_model(self) -> str:
        """The hub id of the base model, or the last part of its directory's name."""
        name, local = model_place(self.config.model.path or "")
        return Path(name).resolve().name if local else name

    @property
    def base_on_hub(self) -> bool:
        return not model_place(self.config.model.path or "")[1]

    @cached_property
    def files_of_rows(self) -> list[str]:
        """The names of the files of rows without their directories; hub ids as they are."""
        return [_without_directory(name, "train") for name in as_list(self.config.data.train)]

    @property
    def data_hash(self) -> str:
        """The fingerprint of the training rows, as every stage's inputs name it."""
        for stage in ("reference", "train", "baseline"):
            file = self.run / stage / "inputs.json"
            if file.exists():
                return str(read_json(file, data=dict)["data"].get("fingerprint"))
        return "not known"

    def recipe(self, stage: str) -> dict[str, Any]:
        """Return the options that decide the result of train, baseline or reference, as values of YAML."""
        plain = self.config.plain()
        found: dict[str, Any] = {key: plain[key] for key in (*_OF_EACH, *_OF_THE_STAGE[stage])}
        found["training"] = {k: v for k, v in plain["training"].items() if k not in _OF_THE_MACHINE}
        found["data"] = {key: plain["data"][key] for key in _OF_THE_DATA}
        if self.config.model.lora.r:
            found["lora"] = plain["model"]["lora"]
        return _without_directories(found)

    def arm(self, stage: str) -> Mapping[str, Any]:
        """Return the figures of the target (`train`) or of the `baseline`; empty if there are none."""
        return self.summary if stage == "train" else self.summary.get("baseline") or {}

    def figures_at(self, stage: str, step: int) -> Mapping[str, float]:
        """Return the held-out figures that were measured after a step, under the names of `arm`; empty if none were."""
        found = next((line for line in self._metrics(stage) if line["step"] == step), {})
        names = {"eval_nll": "eval_nll_after", "eval_accuracy": "eval_accuracy", "eval_exact_match": "eval_exact_match"}
        return {shown: found[key] for key, shown in names.items() if isinstance(found.get(key), float)}

    def is_last(self, stage: str, step: int) -> bool:
        """Return True if the stage has ended with this step, so that the run's figures are those of its weights."""
        lines, ended = self._metrics(stage), stage in self.summary.get("stages", {})
        return bool(ended and lines and lines[-1]["step"] == step)

    def _metrics(self, stage: str) -> list[dict[str, Any]]:
        return read_steps(self.run / stage)

    def over_seeds(self, metric: str) -> Mapping[str, Any] | None:
        """Return seeds, mean and sd of a metric over the seeds of a table that this run is one of; else None."""
        for above in list(self.run.resolve().parents)[:2]:
            if not (above / "table.json").exists():
                continue
            for variant in read_json(above / "table.json").get("variants", {}).values():
                own = any((above / run["run"]).resolve() == self.run.resolve() for run in variant.get("runs", ()))
                if own and variant["metrics"].get(metric, {}).get("seeds", 0) > 1:
                    return dict(variant["metrics"][metric])
        return None

    @property
    def benchmarks(self) -> Mapping[str, Any] | None:
        """The table of `sftmix evaluate`, if there is one."""
        file = self.run / "evaluation" / "table.json"
        return read_json(file) if file.exists() else None

    def benchmarked(self, stage: str) -> bool:
        """Return True if the table of benchmarks has a column of the target (`train`) or of the `baseline`."""
        return self.benchmarks is not None and {"train": "target"}.get(stage, stage) in self.benchmarks["table"][0]


def facts_of(run: Path, config: RunConfig | None = None) -> Facts:
    """Read the facts of a run; raise ConfigError where `run` is no run directory, DifferenceError for a changed stage.

    config  of the run, where it is known; None reads it from the run
    """
    refuse_no_run(run)
    check_finished(run)
    summary = run / "summary.json"
    config = config or read_finished(run)
    return Facts(run, config, read_json(summary) if summary.exists() else {})


def _without_directories(value: Any, key: str = "") -> Any:
    """Return the value of an option with every path in it cut to its name."""
    if isinstance(value, Mapping):
        return {name: _without_directories(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_directories(inner, key) for inner in value]
    return _without_directory(value, key) if isinstance(value, str) else value


def _without_directory(text: str, key: str) -> str:
    """Return a path cut to its name, whether or not it is here still; hub ids and other texts as they are.

    key  name of the option, which tells paths like `a/b/c` from other texts
    """
    path, of_paths = Path(text), key.endswith(("path", "paths", "template", "train", "eval"))
    like_one = text.startswith(("/", "./", "../", "~/")) or path.suffix.lower() in _OF_FILES
    like_one = like_one or (of_paths and text.count("/") > 1)
    return path.name if "/" in text and not hub_name(text) and path.name and (like_one or is_there(path)) else text
