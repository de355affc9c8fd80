"""The rows of a reference: with which tokenizer, template and length it reads them."""

from __future__ import annotations

from dataclasses import replace

from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.config import RunConfig
from sftmix.data import EncodedDataset, Encoder, encoder_for
from sftmix.data.templates import same_tokenizer, tokenizer_content
from sftmix.model.load import context_length, load_tokenizer
from sftmix.model.paths import named
from sftmix.options import ReferenceModel
from sftmix.pipeline.rows import RunRows, encode_rows, resolve_max_length
from sftmix.pipeline.shared import check_same_rows


def rows_of_reference(
    config: RunConfig, rows: RunRows, model: ReferenceModel, world: World, *, option: str = "reference.model"
) -> tuple[str, Encoder, EncodedDataset, list[str]]:
    """Return model path, encoder and rows of a reference, and lines about how it reads rows of its own.

    What is not set is the run's where the tokenizer is the target's: the confidence is then that of the tokens which
    the target sees. Of another tokenizer template and length have another meaning, so they are the model's.
    """
    if not (model.path or model.template or model.max_length):
        return config.model.path, rows.encoder, rows.data.train, []
    path = model.path or config.model.path
    of_model = "reference.paths" if option == "reference" else "reference.model.path"
    with named(of_model if model.path else "model.path"):
        tokenizer = world.node_first(lambda: load_tokenizer(path))
        same = same_tokenizer(tokenizer, rows.encoder.tokenizer)
        encoder = rows.encoder
        if model.template is not None or not same:
            data = replace(config.data, template=model.template)
            encoder = world.node_first(lambda: encoder_for(tokenizer, data))
        length = _length(rows, model, path, option, same=same)
    check_same_rows({option: f"{tokenizer_content(tokenizer)} {length}"}, world)  # each node decides by its own files
    if rows.prepared.text:
        _check_same_windows(model, encoder, rows.encoder, length)
        lines = []
    else:
        whose = "the target's tokenizer" if same else "another tokenizer than the target's"
        lines = [f"{whose}, template {encoder.name}, max_length {length}"]
    if encoder is rows.encoder and length == rows.data.report.max_length:
        return path, encoder, rows.data.train, [f"reference ({path}): {line}" for line in lines]
    ids = rows.data.train.ids  # what the target dropped is not the reference's, either
    key = f"{option}.max_length"
    encoded = encode_rows(rows.prepared, encoder, path, length, world, key=key, keep=ids, progress=world.is_main)
    check_same_rows({option: encoded.train.fingerprint}, world)
    lines = [f"reference ({path}): {line}" for line in [*lines, *encoded.report.lines()]]
    return path, encoder, encoded.train, lines


def _length(rows: RunRows, model: ReferenceModel, path: str, option: str, *, same: bool) -> int:
    """Return the most tokens of an example; windows of text are always the run's."""
    run = rows.data.report.max_length
    assert run is not None, "tokenised rows have a length"
    if rows.prepared.text:
        return run
    if model.max_length is None and same:
        return min(run, context_length(path) or run)
    return resolve_max_length(model.max_length, path, key=f"{option}.max_length")


def _check_same_windows(model: ReferenceModel, reference: Encoder, target: Encoder, max_length: int) -> None:
    """Raise ConfigError for a reference with other windows of text than the target, whose ids could not join."""
    problem = ""
    if model.template is not None:
        problem = f"reference.model.template ({model.template}) has no meaning: plain text has no turns"
    elif model.max_length not in (None, max_length):
        problem = f"reference.model.max_length is {model.max_length} and data.max_length {max_length}"
    elif reference.fingerprint != target.fingerprint:
        problem = f"reference.model.path ({model.path}) has another tokenizer than model.path"
    if problem:
        raise ConfigError(
            f"{problem}. With data.format text, windows join by what they hold: leave template and length out, and use "
            "a reference with the target's tokenizer, or conversations, which join by their rows' ids"
        )
