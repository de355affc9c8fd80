"""Whose run it is: `run` signs what it starts, with a key that only its user has.

The signature is an HMAC over started.json and config.yaml. A run with a signature of this user is their own, moved or
renamed; any other is a stranger's, and what its configuration names elsewhere is not opened.
"""

import hmac
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from sftmix.config.schema import trusts_all
from sftmix.config.values import from_yaml
from sftmix.disk.files import STARTED, read_json, write_json, write_text
from sftmix.disk.places import is_there
from sftmix.disk.texts import read_text
from sftmix.words.errors import ConfigError, DifferenceError
from sftmix.words.given import as_list


def state_directory() -> Path:
    """Return the user's state directory: $SFTMIX_STATE, else in $XDG_STATE_HOME, else ~/.local/state/sftmix."""
    whole, parent = (os.environ.get(name) for name in ("SFTMIX_STATE", "XDG_STATE_HOME"))
    return Path(os.path.expanduser(whole or Path(parent or "~/.local/state", "sftmix")))


def is_own(run: Path) -> bool:
    """Return True for a run that this user has started, as its signature says, and for any run with `--trust`."""
    return trusts_all() or _verifies(run)


def _verifies(run: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError, ConfigError, DifferenceError):  # no key, or no files of a run
        fields = read_json(run / STARTED, signatures=list)
        signed = _signature(_key(state_directory()), fields, read_text(run / "config.yaml"))
        return any(hmac.compare_digest(signed, str(one).encode()) for one in fields["signatures"])
    return False


def is_of_stranger(file: Path) -> bool:
    """Return True for the config.yaml of a run that is not the user's own; beside no run it is a file as any other."""
    run = file.parent
    of_run = is_there(run / STARTED) or any(run.glob("*/inputs.json"))
    return file.name == "config.yaml" and of_run and not is_own(run)


def names_given(words: Iterable[Any]) -> set[Path]:
    """Return the names in values of the command line; of openai/gsm8k:main@test also the hub id."""
    names = {str(name) for word in words for name in as_list(from_yaml(word, texts=True))}
    return {Path(part) for name in names for part in (name, re.split("[:@]", name)[0])}


def write_start(run: Path, fields: Mapping[str, Any], configuration: str) -> None:
    """Write started.json and config.yaml, signed unless the directory is a stranger's, or no key can be made.

    A kill between both files leaves a directory that is the user's own: started.json is signed with the configuration
    of before as well. A directory without config.yaml is of whoever writes it. If both are there as they would be
    written, they stay, whoever has signed them: a run goes on in a container as well, which may have another key.
    """
    file, signatures = run / "config.yaml", list[str]()
    with suppress(OSError, ValueError, DifferenceError):
        if read_text(file) == configuration and read_json(run / STARTED).items() >= fields.items():
            return
    fields = {**fields, "id": secrets.token_hex(16)}
    if (not file.exists() or _verifies(run)) and (key := _made_key(state_directory())):
        texts = [configuration, *([read_text(file)] if file.exists() else [])]
        signatures = [_signature(key, fields, text).decode() for text in dict.fromkeys(texts)]
    # Before config.yaml: that file in a directory without this one would be refused as somebody else's.
    write_json(run / STARTED, {**fields, "signatures": signatures})
    write_text(file, configuration)


def _signature(key: bytes, fields: Mapping[str, Any], configuration: str) -> bytes:
    signed = {**fields, "signatures": [], "config": configuration}
    return hmac.digest(key, json.dumps(signed, sort_keys=True).encode(), "sha256").hex().encode()


def _key(directory: Path) -> bytes:
    if not (key := (directory / "key").read_bytes()):
        raise ValueError(f"{directory / 'key'} is empty; delete it")
    return key


@cache
def _made_key(directory: Path) -> bytes | None:
    """Return the key, after making it if there is none; None, and one line, if that is not possible."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileExistsError), open(directory / "key", "x", opener=partial(os.open, mode=0o600)) as file:
            file.write(secrets.token_hex(32))
        return _key(directory)
    except (OSError, ValueError) as error:
        print(
            f"note: the run is not signed, and will be read as a stranger's: {error}; let SFTMIX_STATE name a "
            "directory that you can write",
            file=sys.stderr,
        )
        return None
