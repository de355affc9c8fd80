"""What can be known of a model without loading its weights: its context length, and a fingerprint of its files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sftmix.artefacts import sha256_file, sha256_json
from sftmix.models import model_config

MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""What decides weights, tokenizer and chat template of a model directory."""


def context_length(path: str) -> int | None:
    """Positions the model was made for; None where its config does not say."""
    return getattr(model_config(path).get_text_config(), "max_position_embeddings", None)


def fingerprint(path: str) -> str:
    """Identity of a file's content, or of a model and its tokenizer: a hub model's commit, or a directory's hash."""
    if Path(path).is_file():
        return _hash(Path(path))
    commit = getattr(model_config(path), "_commit_hash", None)
    if commit:
        return f"{path}@{commit}"
    files = sorted(p for p in Path(path).expanduser().iterdir() if p.suffix in MODEL_FILES)
    return sha256_json({p.name: _hash(p) for p in files})


def _hash(path: Path) -> str:
    """Hash of a file, read once per process as long as its size and time stay the same: weights take seconds."""
    about = path.stat()
    return _hash_of(path, about.st_size, about.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)
