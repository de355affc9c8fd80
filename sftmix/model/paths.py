"""Names of models: a directory or a hub id; apart from loading, as a wrong name is refused before torch is imported."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from sftmix.disk.files import read_object
from sftmix.disk.places import HUB_ID, is_there, place_of
from sftmix.disk.texts import read_text
from sftmix.words.errors import ConfigError, DifferenceError

_NODE = re.compile(r"^node \d+ \(.*\): \Z")  # "node 1 (gpu-07, from rank 8): "
"""What `World.node_first` puts before the error of a node."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Where transformers looks for weights, unless config.json names another file."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".gguf")
"""Endings of files of weights that can hold programs, or that are of other libraries."""


def model_place(path: str | Path) -> tuple[str, bool]:
    """Return the directory of a model and True, or its hub id and False.

    Raises ConfigError for a path that is no directory. `NAME` and `OWNER/NAME` are hub ids if there is no such path.
    """
    # "./a", "~/a" and "a/b/c" can only be directories; "gpt2" and "org/name" are hub ids unless there are such paths
    name, place = str(path), place_of(path)
    if name.startswith(("/", ".", "~")) or not HUB_ID.match(name) or is_there(place):
        if not (name and os.path.isdir(place)):
            raise ConfigError(
                f"model.path: {path} is not a directory ({place.absolute()}). Give a hub id or a directory with a "
                "model."
            )
        return str(place), True
    return name, False


def holds_adapters(path: str | Path) -> ConfigError:
    """Return the error for a directory, or a repository of the hub, that holds adapters in the place of a model."""
    return ConfigError(f"model.path: {path} holds adapters, not a model: sftmix export RUN --to DIR --merge makes one.")


def refuse_files(path: str | Path) -> None:
    """Raise ConfigError for a directory that holds adapters in the place of a model, or weights in pickles only."""
    names = sorted(file.name for file in place_of(path).glob("*"))
    if "adapter_config.json" in names:
        raise holds_adapters(path)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        pickle = min(pickles, key=lambda name: "model" not in name)  # an optimizer.pt may be beside the weights
        if pickle.endswith(".gguf"):
            raise ConfigError(f"model.path: {path} has GGUF files alone; name the model that {pickle} was made from")
        raise ConfigError(
            f"model.path: {path}: there is no safetensors file; found {pickle}, a pickle, which can run a program "
            "when it is read. Only safetensors are read. If you trust the directory, write its weights anew, and name "
            "the new one: "
            'python -c "import sys, transformers as t; m, t = t.AutoModelForCausalLM, t.AutoTokenizer; '
            '[x.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for x in (m, t)]" OLD NEW'
        )


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a model's directory from which transformers reads the weights, there or not.

    Raises ConfigError for one that is no safetensors file in the directory: transformers reads whatever config.json and
    an index name, pickles among it.
    """
    # {"transformers_weights": "other.safetensors"} names them, and is read before the usual names
    first = str(_object(directory / "config.json").get("transformers_weights") or "")
    first = first or next((name for name in WEIGHTS if (directory / name).exists()), WEIGHTS[0])
    names = [first]
    if first.endswith(".index.json"):
        shards = _object(directory / first).get("weight_map")  # {"lm_head.weight": "model-00002-of-00002.safetensors"}
        names = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
    for name in names:
        place = PurePath(name)
        if place.suffix != ".safetensors" or place.is_absolute() or ".." in place.parts:
            raise ConfigError(
                f"model.path: {directory} names {name} as a file of its weights (in config.json or {first}); only "
                "safetensors files within the directory are read, as others can run a program or change unseen"
            )
    return [directory / name for name in names]


def _object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; {} without the file. ConfigError for anything else."""
    try:
        return read_object(read_text(file), file) if file.exists() else {}
    except (OSError, ValueError, DifferenceError) as error:
        raise ConfigError(f"model.path: {file} cannot be read: {error}") from error


@contextmanager
def named(option: str, usual: str = "model.path") -> Iterator[None]:
    """Let errors name the option that chose a model or its template, in place of the target's."""
    try:
        yield
    except ConfigError as error:
        # "model.path: x is ..." -> "reference.model.path: x is ...", also behind _NODE; never within another message
        before, found, problem = str(error).partition(f"{usual}:")
        if found and (not before or _NODE.match(before)):
            error.args = (f"{before}{option}:{problem}",)
        raise
