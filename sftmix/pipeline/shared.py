"""What the nodes of a run must have in common: the run directory, and the rows; tried before anything is made."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sftmix.common.errors import ConfigError
from sftmix.common.files import write_text

if TYPE_CHECKING:
    from sftmix.common.world import World

PATIENCE = 10.0
"""Seconds until a file that rank 0 has written must be seen by other nodes, which may remember the directory without
it (NFS does so for some seconds)."""


def check_same_directory(path: Path, world: World) -> None:
    """Raise ConfigError on every rank if a node does not see the run directory that rank 0 writes.

    Rank 0 writes a file with a random name, which the first rank of each node looks for. Call it on every rank, in the
    directory that exists; on one process it does nothing.
    """
    if world.size == 1:
        return
    name = world.share(f".tmp-nonce.{secrets.token_hex(8)}")  # `remove_leftovers` knows such names, if this is killed
    world.on_main(lambda: write_text(path / name, name))
    seen = world.local_rank != 0 or _appears(path / name)
    nodes = world.of_nodes((seen, str(path.absolute())))
    if world.is_main:
        (path / name).unlink(missing_ok=True)
    blind = [f"{node}, where it is {place}" for node, (seen, place) in nodes.items() if not seen]
    if blind:
        first = next(iter(nodes))
        raise _everywhere(
            f"out: not every node sees the run directory that {first} writes, {nodes[first][1]}. These do not: "
            f"{'; '.join(blind)}. Choose an --out on a file system that all nodes share, by its whole path"
        )


def _appears(path: Path) -> bool:
    """Return True as soon as a file exists, False if it does not within PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            os.listdir(path.parent)  # NFS then looks again
    return True


def check_same_rows(fingerprints: Mapping[str, str], world: World) -> None:
    """Raise ConfigError on every rank if a node has read other rows than the first node, from files of its own.

    fingerprints  option -> hash of the rows it gave, and of what made tokens of them
    """
    (first, expected), *others = world.of_nodes(dict(fingerprints)).items()
    different = [
        f"{option} of {node}" for node, hashes in others for option in hashes if hashes[option] != expected[option]
    ]
    if different:
        raise _everywhere(
            f"not every node has the same rows or the same tokenizer as {first}. Other ones: {', '.join(different)}. "
            "Give every node the same files, or put them on a file system that all nodes share"
        )


def _everywhere(message: str) -> ConfigError:
    error = ConfigError(message)
    error.everywhere = True
    return error
