"""The rows of a run: read once, then tokenised for the target, and again for a reference with another tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json
from sftmix.common.tables import read_confidence, read_ids
from sftmix.common.world import World
from sftmix.components.base import Need
from sftmix.components.contracts import check_selection
from sftmix.components.selection import All
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.read import read_finished
from sftmix.data import EncodedDataset, Encoder, LoadedData, Prepared, encode, encoder_for, prepare, render_preview
from sftmix.model.load import context_length, load_tokenizer, refuse_quantized
from sftmix.pipeline.directory import CONTENTS
from sftmix.pipeline.held_out import held_out_groups
from sftmix.pipeline.shared import check_same_rows
from sftmix.types import Scores


@dataclass(frozen=True)
class RunRows:
    """The training and held-out rows of a run.

    prepared  the rows as read, before any tokenizer
    encoder   the target's tokenizer and chat template
    data      the selected rows, as the target sees them
    eval_groups  the group of each held-out row, by which its NLL is told, too; None: one group
    """

    prepared: Prepared
    encoder: Encoder
    data: LoadedData
    eval_groups: Sequence[str] | None = None

    def table(self, confidence: Path | None = None) -> Scores:
        """Return the table that splitters, pair samplers and selectors see.

        confidence  file of the confidence; None: confidence and variability are NaN
        """
        return table_of(self.data.train, confidence)


def read_rows(config: RunConfig, world: World, *, progress: bool = False) -> tuple[RunConfig, Prepared]:
    """Read the rows, and return them with the configuration, whose `data.format` is now settled."""
    prepared = world.node_first(lambda: prepare(config.data, config.seed, progress=progress))
    return resolve_text(config, prepared), prepared


def resolve_text(config: RunConfig, prepared: Prepared) -> RunConfig:
    """Return the configuration, with data.format text if `auto` recognised plain text.

    Raises ConfigError for a confidence that needs instructions and responses.
    """
    if not prepared.text:
        return config
    if Need.RESPONSE_ALONE in config.confidence.needs:
        raise ConfigError(
            f"confidence {type(config.confidence).__name__} compares a response with and without its instruction, and "
            "data.format text has no instructions; use --confidence Perplexity"
        )
    return replace(config, data=replace(config.data, format="text"))


def tokenised_rows(
    config: RunConfig,
    prepared: Prepared,
    world: World,
    *,
    select: Callable[[EncodedDataset], Sequence[str]] | None = None,
    progress: bool = False,
) -> RunRows:
    """Tokenise the rows for the target, and keep those that `selector` keeps.

    select  training rows -> the ids to keep, in file order; None: the selector of the configuration
    """
    encoder = world.node_first(lambda: encoder_for(load_tokenizer(config.model.path), config.data))
    refuse_quantized(config.model.path)  # before rows are tokenised and a reference is trained
    path, longest = config.model.path, config.data.max_length

    def encoded(keep: Sequence[str] | None = None) -> LoadedData:
        return encode_rows(prepared, encoder, path, longest, world, key="data.max_length", keep=keep, progress=progress)

    data = encoded()
    if not isinstance(config.selector, All):
        whole = data.train
        data = encoded(selected_ids(config, whole) if select is None else select(whole))
        chosen = f"{len(data.train):,} of {len(whole):,} examples selected by {type(config.selector).__name__}"
        data.report.notes.append(chosen)
    sides = {"data.train": data.train, "data.eval": data.eval}
    check_same_rows({option: rows.fingerprint for option, rows in sides.items() if rows is not None}, world)
    groups, note = held_out_groups(data.eval, prepared.options.eval)
    data.report.notes += [*([note] if note else []), *_on_thinking(data, encoder)]
    return RunRows(prepared, encoder, data, groups)


def _on_thinking(data: LoadedData, encoder: Encoder) -> list[str]:
    """Return a note if most responses think, and the exported template would have the model begin without it."""
    if 2 * data.report.counts.get("own_block", 0) <= len(data.train) + len(data.eval or ()):
        return []
    return [
        f"Most responses have thinking of their own, but chat, evaluate and the exported template begin with "
        f"{encoder.block!r} unless enable_thinking is true: --data.template chatml writes no such block anywhere."
    ]


def rows_of_run(path: Path, *, progress: bool = False) -> tuple[RunConfig, RunRows]:
    """Return the configuration of a run that has selected its rows, and these, read from their files or the cache.

    Raises ConfigError where the rows are no longer those that a stage of the run was made from.
    """
    selected = path / "selection" / "selected.parquet"
    config, prepared = read_rows(read_finished(path), World(), progress=progress)
    rows = tokenised_rows(config, prepared, World(), select=lambda _: read_ids(selected), progress=progress)
    recorded = [path / stage / "inputs.json" for stage in ("train", "reference")]
    if inputs := next((file for file in recorded if file.exists()), None):  # a reference may be of an earlier try
        _refuse_other_rows(path, read_json(inputs, data=dict), rows.data)
    return config, rows


def _refuse_other_rows(run: Path, then: Mapping[str, Any], now: LoadedData) -> None:
    """Raise ConfigError where a side of the rows is not what a stage recorded; a reference records one side alone."""
    held_out = now.eval.fingerprint if now.eval else None
    for name, before, here in (
        ("data.fingerprint", then["data"].get("fingerprint"), now.train.fingerprint),
        ("eval", then.get("eval", held_out), held_out),
    ):
        if before != here:
            raise ConfigError(
                f"{run} was made from other rows: {CONTENTS[name]}. The files, the tokenizer, the template, or the "
                "version of sftmix has changed; bring it back to what it was"
            )


def encode_rows(
    prepared: Prepared,
    encoder: Encoder,
    model_path: str,
    max_length: int | None,
    world: World,
    *,
    key: str,
    keep: Sequence[str] | None = None,
    progress: bool = False,
) -> LoadedData:
    """Tokenise the rows, or those with the ids `keep`, with an encoder.

    max_length  most tokens of an example; None: as many as the model allows
    key         the option behind max_length, for messages
    """
    length = resolve_max_length(max_length, model_path, key=key)
    return world.node_first(
        lambda: encode(prepared, encoder, max_length=length, keep=keep, length_option=key, progress=progress)
    )


def selected_ids(config: RunConfig, rows: EncodedDataset) -> list[str]:
    """Return the ids that the selector keeps, in file order."""
    chosen = config.selector.select(table_of(rows), seed=config.seed)
    return [rows.ids[row] for row in check_selection(config.selector, chosen, len(rows))]


def table_of(rows: EncodedDataset, confidence: Path | None = None) -> Scores:
    """Return the rows as a table of scores; without a file of confidence, that column is NaN."""
    nothing = np.full(len(rows), np.nan)
    values, spread = (nothing, nothing) if confidence is None else read_confidence(confidence)[1:]
    return Scores(
        id=rows.ids,
        row=np.arange(len(rows), dtype=np.int64),
        confidence=values,
        variability=spread,
        n_tokens=rows.n_targets,
        label=rows.labels,
        columns=rows.columns,
    )


def resolve_max_length(requested: int | None, model_path: str, *, key: str) -> int:
    """Return the most tokens of an example: as requested, or the smaller of 2,048 and the model's context."""
    context = context_length(model_path)
    if requested is not None and context is not None and requested > context:
        raise ConfigError(f"{key} is {requested}, but {model_path} has a context of {context} tokens")
    return requested or min(2048, context or 2048)


def any_packed(*data: EncodedDataset | None) -> bool:
    """Return True if any row of these data sets holds several documents."""
    return any(rows is not None and rows.packed for rows in data)


def preview(config: RunConfig, rows: int, *, color: bool = True) -> str:
    """Return a text of the first selected rows as the model sees them, and of dropped rows; nothing is written."""
    validate(config, needs_out=False)
    config, prepared = read_rows(config, World())
    found = tokenised_rows(config, prepared, World())
    return render_preview(found.data, found.encoder, range(min(rows, len(found.data.train))), color=color)
