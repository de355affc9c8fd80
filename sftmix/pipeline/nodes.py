"""What nodes must have in common: the run directory, the rows and the model, which each reads from its own disks."""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sftmix.disk.files import write_text
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError

LOOKS = 50
"""How often, five times a second, a node looks for a file that rank 0 has written: it may remember the directory
without it (NFS does so for some seconds)."""


def check_same_directory(path: Path, world: World) -> None:
    """Raise ConfigError on every rank, which names a node that does not see the run directory which rank 0 writes.

    Rank 0 writes a file with a random name, which all others look for. Call it on every rank, in the directory that
    exists; on one process it does nothing.
    """
    if world.size == 1:
        return
    file = path / world.share(f".tmp-nonce.{secrets.token_hex(8)}")  # `remove_leftovers` knows it, if this is killed
    world.on_main(lambda: write_text(file, ""))

    def look() -> None:
        for _ in range(LOOKS):
            if file.exists():
                return
            time.sleep(0.2)
            if path.is_dir():
                os.listdir(path)  # NFS then looks again
        raise ConfigError(
            f"out: {path.absolute()} is not the run directory that rank 0 writes. Choose an --out on a file system "
            "that all nodes share, by its whole path"
        )

    try:
        world.node_first(look)
        world.barrier()
    finally:
        if world.is_main:
            file.unlink(missing_ok=True)


def check_same(read: Callable[[], Mapping[str, str | None]], world: World) -> None:
    """Raise ConfigError on every rank, which names a node that reads other rows, or another model, than the first one.

    Each rank cuts its shards from the files of its node: of two models it would train a blend. Nodes compare what
    decides whether a stage is read back: hashes of rows, the commit of a hub id, the hash of a directory.

    read  returns option -> hash of what it gave, on the first rank of each node: hashing takes seconds
    """
    if world.size == world.local_size:  # one node
        return
    expected = world.from_main(read)

    def compare() -> None:
        own = expected if world.local_rank else read()  # one rank a node hashes
        for name, value in expected.items():
            if own[name] != value:
                raise ConfigError(
                    f"{name}: what this node reads, the tokenizer included, is {own[name]}, and on the first node "
                    f"{value}. Give every node the same files, or put them on a file system that all nodes share (hf "
                    "download ID --revision COMMIT --local-dir DIR makes a directory of a model)"
                )

    world.node_first(compare)
