"""The rows of a reference: with which tokenizer, template and length it reads them, and what of these is the run's."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.components.base import Reference
from sftmix.components.reference import FromCheckpoints
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset, Encoder, encoder_for
from sftmix.data.templates import same_tokenizer
from sftmix.model.load import context_length, load_tokenizer
from sftmix.model.paths import named
from sftmix.options import ReferenceModel
from sftmix.pipeline.rows import RunRows, encode_rows, resolve_max_length
from sftmix.pipeline.shared import check_same_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ITS_OWN, THE_RUNS = "its own", "the run's"


@dataclass(frozen=True)
class Reading:
    """How a reference reads the rows.

    path        the model
    same        its tokenizer is the target's
    encoder     tokenizer and template
    max_length  most tokens of an example
    sources     where template and length come from, in words
    inherited   those of them that are the run's in place of what the model alone would have, by name
    """

    path: str
    same: bool
    encoder: Encoder
    max_length: int
    sources: tuple[str, str]
    inherited: dict[str, str | int]

    def note(self) -> str:
        """Return one line about template and length."""
        other = "" if self.same else "another tokenizer than the target's: "
        template, length = self.sources
        return f"{other}template {self.encoder.name} ({template}), max_length {self.max_length} ({length})"


def rows_of_reference(
    config: RunConfig, rows: RunRows, model: ReferenceModel, world: World, *, option: str = "reference.model"
) -> tuple[str, Encoder, EncodedDataset, list[str]]:
    """Return model path, encoder and rows of a reference, and lines about rows that are not the target's own."""
    if not _has_rows_of_its_own(model):
        return config.model.path, rows.encoder, rows.data.train, []
    reading = _reading(config, rows, model, world, option)
    path, encoder, length = reading.path, reading.encoder, reading.max_length
    lines = [] if rows.prepared.text else [reading.note()]
    if rows.prepared.text:
        check_same_windows(model, encoder, rows.encoder, length)
    if encoder is rows.encoder and length == rows.data.report.max_length:
        return path, encoder, rows.data.train, [f"reference ({path}): {line}" for line in lines]
    ids = rows.data.train.ids  # what the target dropped is not the reference's, either
    key = f"{option}.max_length"
    data = encode_rows(rows.prepared, encoder, path, length, world, key=key, keep=ids, progress=world.is_main)
    check_same_rows({option: data.train.fingerprint}, world)
    return path, encoder, data.train, [f"reference ({path}): {line}" for line in [*lines, *data.report.lines()]]


def inherited_from_run(config: RunConfig, rows: RunRows, world: World) -> dict[str, str | int]:
    """Return template and length that the reference takes from the run in place of what its model alone would have."""
    model, option = asked_of(config.reference)
    if not _has_rows_of_its_own(model):
        return {}
    return _reading(config, rows, model, world, option).inherited


def asked_of(reference: Reference) -> tuple[ReferenceModel, str]:
    """Return model, template and length that a reference is configured with, and the option that they stand below."""
    if isinstance(reference, FromCheckpoints):
        path, template, longest = reference.paths[0], reference.template, reference.max_length
        return ReferenceModel(path=path, template=template, max_length=longest), "reference"
    model = getattr(reference, "model", None)
    return model if isinstance(model, ReferenceModel) else ReferenceModel(), "reference.model"


def _has_rows_of_its_own(model: ReferenceModel) -> bool:
    return bool(model.path or model.template or model.max_length)


def _reading(config: RunConfig, rows: RunRows, model: ReferenceModel, world: World, option: str) -> Reading:
    """Settle how a reference reads the rows: what is not set is the run's if the tokenizer is the target's."""
    path = model.path or config.model.path
    inherited: dict[str, str | int] = {}
    with named(_option_of_path(model, option)):
        tokenizer = load_tokenizer(path)
        same = same_tokenizer(tokenizer, rows.encoder.tokenizer)
        takes_template = same and model.template is None
        encoder = rows.encoder if takes_template else _encoder(config, tokenizer, model.template, world)
        if takes_template and model.path and not _is_own_template(config, tokenizer, rows.encoder, world):
            inherited["template"] = encoder.name
        length, length_source = _length(rows, model, path, same, option)
        alone = length if rows.prepared.text else resolve_max_length(None, path, key=option)
    if model.max_length is None and length != alone:
        inherited["max_length"] = length
    source = THE_RUNS if takes_template else f"{option}.template" if model.template else ITS_OWN
    return Reading(path, same, encoder, length, (source, length_source), inherited)


def _length(rows: RunRows, model: ReferenceModel, path: str, same: bool, option: str) -> tuple[int, str]:
    """Return the most tokens of an example, and where that comes from; windows of text are always the run's."""
    run = rows.data.report.max_length
    assert run is not None, "tokenised rows have a length"
    if rows.prepared.text:
        return run, THE_RUNS
    key = f"{option}.max_length"
    if model.max_length is not None or not same:
        asked = resolve_max_length(model.max_length, path, key=key)
        return asked, ITS_OWN if model.max_length is None else key
    context = context_length(path)
    if context is not None and context < run:
        return context, f"its context, shorter than the run's {run}"
    return run, THE_RUNS


def _option_of_path(model: ReferenceModel, option: str) -> str:
    if not model.path:
        return "model.path"
    return "reference.paths" if option == "reference" else "reference.model.path"


def _encoder(config: RunConfig, tokenizer: PreTrainedTokenizerBase, template: str | None, world: World) -> Encoder:
    return world.node_first(lambda: encoder_for(tokenizer, replace(config.data, template=template)))


def _is_own_template(config: RunConfig, tokenizer: PreTrainedTokenizerBase, run: Encoder, world: World) -> bool:
    """Return True if a model with the target's tokenizer has the run's template for its own, too."""
    with contextlib.suppress(ConfigError):  # of a template that nobody asked for
        own = _encoder(config, tokenizer, None, world)
        return replace(own, tokenizer=run.tokenizer).fingerprint == run.fingerprint
    return False


def check_same_windows(model: ReferenceModel, reference: Encoder, target: Encoder, max_length: int | None) -> None:
    """Raise ConfigError for a reference with other windows of text than the target, whose ids could not join.

    max_length  tokens of the target's windows
    """
    if model.template is not None:
        raise ConfigError(
            f"reference.model.template ({model.template}) and data.format text exclude each other: plain text has no "
            "turns"
        )
    if model.max_length not in (None, max_length):
        raise ConfigError(
            f"reference.model.max_length is {model.max_length} and data.max_length {max_length}: windows of text join "
            "by what they hold, so both must be equal; leave reference.model.max_length out"
        )
    if reference.fingerprint != target.fingerprint:
        raise ConfigError(
            f"reference.model.path ({model.path}) has another tokenizer than model.path: it would cut the text into "
            "other windows, whose confidence says nothing about the target's. Use a reference with the same tokenizer "
            "(or none: the target's base model), or conversations, which join by their rows' ids"
        )
