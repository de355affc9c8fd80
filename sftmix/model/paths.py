"""Names of models: a directory or a hub id; apart from loading, as a wrong name is refused before torch is imported."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftmix.disk.places import HUB_ID, is_there, place_of
from sftmix.words.errors import ConfigError

_NODE = re.compile(r"^node \d+ \(.*\): \Z")  # "node 1 (gpu-07, from rank 8): "
"""What `World.node_first` puts before the error of a node."""

ADAPTERS = "adapter_config.json"
"""The file of PEFT, beside adapters."""

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
            full = "" if str(place.absolute()) == name else f" ({place.absolute()})"
            raise ConfigError(
                f"model.path: {path} is not a directory{full}. Give a hub id or a directory with a model."
            )
        return str(place), True
    return name, False


def holds_adapters(path: str | Path) -> ConfigError:
    """Return the error for a directory, or a repository of the hub, that holds adapters in the place of a model."""
    return ConfigError(f"model.path: {path} holds adapters, not a model: sftmix export RUN --to DIR --merge makes one.")


def refuse_files(path: str | Path) -> None:
    """Raise ConfigError for a directory that holds adapters in the place of a model, or weights in pickles only."""
    names = sorted(file.name for file in place_of(path).glob("*"))
    if ADAPTERS in names:
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
