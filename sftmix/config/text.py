"""What plain text asks of the rest of a configuration; whether rows are plain text is known once they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sftmix.common.errors import ConfigError
from sftmix.options import ReferenceModel

if TYPE_CHECKING:
    from sftmix.config import RunConfig
    from sftmix.data import Encoder, Prepared


def resolve_text(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The configuration with data.format text where `auto` recognised it; as it is for conversations.

    Raises ConfigError for a choice that needs instructions and responses.
    """
    if not prepared.text:
        return config
    if config.confidence.needs_response_alone:
        raise ConfigError(
            f"confidence {type(config.confidence).__name__} compares a response with and without its instruction, and "
            "data.format text has no instructions; use --confidence Perplexity"
        )
    return replace(config, data=replace(config.data, format="text"))


def check_same_windows(model: ReferenceModel, reference: Encoder, target: Encoder, max_length: int | None) -> None:
    """ConfigError for a reference whose windows of text would not be the target's, so that no id could join.

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
