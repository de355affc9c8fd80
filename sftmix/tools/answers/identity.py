"""The inputs of answers: questions, models, their encoders and the options; known before torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import MANIFEST, sha256_file, sha256_json
from sftmix.config.read import read_finished
from sftmix.model.paths import model_place
from sftmix.pipeline.finished import FinishedModel
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.questions import Question

TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt")
MODEL_FILES = (*TOKENIZER_FILES, ".safetensors")


def inputs_of(
    form: str, questions: Sequence[Question], models: Sequence[FinishedModel], options: AnswerOptions
) -> dict[str, Any]:
    """Return all that decides the answers, in types that JSON can write.

    form  name of the format
    Raises ConfigError if a model of the hub cannot be found.
    """
    asked = [{**question.plain(), "temperature": options.at(question.temperature)} for question in questions]
    return {
        "format": form,
        "prompts": sha256_json(asked),
        "models": {model.name: {"weights": _weights(model.path), **_encoder(model)} for model in models},
        **options.identity(),
    }


def _weights(place: str) -> str:
    """Return the hash of a manifest or of a directory's files, or the commit of a hub id."""
    manifest = Path(place).parent / MANIFEST
    if Path(place).is_dir() and manifest.exists():
        return sha256_file(manifest)
    return _files(place, MODEL_FILES)


def _encoder(model: FinishedModel) -> dict[str, Any]:
    """Return what decides the prompt's ids in a run; a model from elsewhere brings its tokenizer with its weights."""
    if model.run is None:
        return {}
    config = read_finished(model.run)
    template = config.data.template
    own = Path(template).expanduser() if template else None
    return {
        "format": config.data.format,
        "template": sha256_file(own) if own is not None and own.is_file() else template,
        "special_tokens": config.data.special_tokens,
        "tokenizer": _files(model_place(config.model.path)[0], TOKENIZER_FILES),
    }


def _files(place: str, suffixes: Collection[str]) -> str:
    path = Path(place)
    if not path.is_dir():
        return _commit(place)
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    return sha256_json({file.name: sha256_file(file) for file in files})


def _commit(name: str) -> str:
    """Return `NAME@COMMIT` of a hub id, as it is loaded here: the newest, or without a network the one on this disk."""
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(name, "config.json")
    except (OSError, ValueError) as error:  # no such name, no access, no network
        raise ConfigError(
            f"model {name}: its commit on the hub cannot be found (no directory here; as a hub id: is it spelt right, "
            f"is there a network?): {error}"
        ) from error
    return f"{name}@{Path(config).parent.name}"
