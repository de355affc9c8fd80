"""A private directory with the admitted files of a model, which is all that transformers sees of it.

A file that is not admitted cannot be reached, whatever config.json, an index or a tokenizer's configuration name: no
pickle, no code, no other version of a configuration, nothing elsewhere. A repository of the hub is a directory of its
cache, whose files are links.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from transformers import PretrainedConfig

from sftmix.disk.files import read_json
from sftmix.disk.places import commit_of
from sftmix.disk.regular import refuse_link
from sftmix.model.paths import ADAPTERS, model_place
from sftmix.words.errors import ConfigError, DifferenceError
from sftmix.words.shown import quoted

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""One file of weights, or which of several files has which weight."""
VOCABULARIES = (
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tokenizer.model.v3",  # Mistral's
    "tiktoken.model",
    "tekken.json",
)
"""What tokenizers read beside their configuration, by the `vocab_files_names` of their classes."""
FILES = (
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    *VOCABULARIES,
)
"""All that is admitted but weights and further templates."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a model that also takes images, which are not admitted: an export copies them, as servers need them."""
TEMPLATES = "additional_chat_templates"
"""Folder of the templates that a tokenizer has beside its first."""
QUANTIZED = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4", "torchao")
"""The `quant_method` of quantised weights that are read."""

MOST_REPEATS = 20_000
"""Most layers of a model, and experts of a layer: Doge's config.json has 16,384 of these."""
REPEATS = ("layer", "layers", "blocks", "experts", "depth")
"""How the names of their numbers end in config.json: num_hidden_layers, n_layer, n_routed_experts."""

_private: list[TemporaryDirectory[str]] = []
"""Until the process ends: a tokenizer copies its vocabulary from there when it is saved."""


class _Silent(tqdm):
    """No bar, as for small files."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **{**options, "disable": True})


class ModelFiles(NamedTuple):
    """A model that was found.

    name       its directory or hub id
    local      True for a directory
    directory  the directory, of a hub id in the cache: named by the commit, without weights until they are fetched
    """

    name: str
    local: bool
    directory: Path


def find_model(path: str | Path) -> ModelFiles:
    """Return where the files of a directory or hub id are; ConfigError for a path that is no directory."""
    name, local = model_place(path)
    wanted = (*FILES, INDEX, ADAPTERS, f"{TEMPLATES}/*.jinja", *PROCESSORS)
    return ModelFiles(name, local, Path(name if local else _fetched(name, wanted, commit_of(name), bars=_Silent)))


@cache  # so that a name means one commit within a process
def _fetched(name: str, files: Sequence[str], commit: str | None, bars: type[tqdm] | None = None) -> str:
    return snapshot_download(name, revision=commit, allow_patterns=list(files), tqdm_class=bars)


def admitted_files(directory: Path) -> dict[str, Path]:
    """Return the admitted files of a directory but weights, by their names in it: regular ones, or links to such."""
    files = [*(directory / name for name in FILES), *(directory / TEMPLATES).glob("*.jinja")]
    return {file.relative_to(directory).as_posix(): file for file in files if file.is_file()}


def admit(model: ModelFiles) -> Path:
    """Return a fresh private directory with links to the admitted files of a model, but weights."""
    _private.append(TemporaryDirectory(prefix="sftmix-model-"))
    private = Path(_private[-1].name)
    _link(admitted_files(model.directory), private)
    if (private / CONFIG).exists():
        _refuse_repeats(model.name, private / CONFIG)
    return private


def _refuse_repeats(model: str, config: Path) -> None:
    """Raise ConfigError for a config.json with more layers or experts than anybody builds: building them never ends."""
    try:
        parts = [read_json(config)]
    except DifferenceError:  # transformers says what is wrong with it
        return
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]  # such as text_config
        for name, value in part.items():
            if isinstance(value, int) and value > MOST_REPEATS and name.endswith(REPEATS):
                raise ConfigError(
                    f"model.path: config.json of {model} has {quoted(name)}: {quoted(value)}; at most {MOST_REPEATS:,} "
                    "are built, and no model that is known has as many. Give the number that its weights have"
                )


def admit_weights(model: ModelFiles, private: Path, config: PretrainedConfig) -> None:
    """Add the weights of a model to its private directory.

    config  as it was loaded from the private directory

    Raises ConfigError for a file of weights that is not one of safetensors at the top of the directory, or for weights
    that are quantised in a way that is not read.
    """
    for method in quantized_by(config):
        if method not in QUANTIZED:
            raise ConfigError(
                f"model.path: the weights of {model.name} are quantised by {method!r:.80}, which is not read; what is "
                f"read: {', '.join(QUANTIZED)}. Name the model it was made from"
            )
    files = [*weight_files(model, config, fetch=True), model.directory / INDEX]
    _link({file.name: file for file in files if file.is_file()}, private)


def quantized_by(config: PretrainedConfig) -> list[Any]:
    """Return the `quant_method` of the stored weights, for the whole model and its part for text, if they have any."""
    parts = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
    return [stored.get("quant_method") if isinstance(stored, Mapping) else stored for stored in parts if stored]


def weight_files(model: ModelFiles, config: PretrainedConfig, *, fetch: bool = False) -> list[Path]:
    """Return the files from which transformers reads the weights of a model, there or not.

    config  as it was loaded from a private directory
    fetch   those of a hub id, with a bar
    Raises ConfigError as `admit_weights`.
    """
    names, by = [str(getattr(config, "transformers_weights", None) or WEIGHTS)], CONFIG
    if names == [WEIGHTS] and not (model.directory / WEIGHTS).exists() and (model.directory / INDEX).is_file():
        try:
            shards = read_json(model.directory / INDEX, weight_map=dict)["weight_map"]
        except DifferenceError as error:
            raise ConfigError(f"model.path: {error}") from error
        names, by = sorted(set(map(str, shards.values()))), INDEX  # {"lm_head.weight": "model-00002-of-00002.saf..."}
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ConfigError(
                f"model.path: {model.name} names {name} as a file of its weights (in {by}); only safetensors files in "
                "the directory itself are read, as others can run a program or change unseen"
            )
    if fetch and not model.local:
        _fetched(model.name, tuple(names), model.directory.name)
    return [model.directory / name for name in names]


def _link(files: Mapping[str, Path], private: Path) -> None:
    """Put files into a private directory under their names: links, or what the file system has in their place."""
    for name, file in files.items():
        place, there = private / name, refuse_link(file).resolve()
        place.parent.mkdir(exist_ok=True)
        for way in (os.symlink, os.link, shutil.copyfile):  # Windows lets few make symbolic links
            try:
                way(there, place)
                break
            except OSError:
                if way is shutil.copyfile:
                    raise
