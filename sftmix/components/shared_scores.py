"""Scores of a data set from the hub, as local files, which huggingface_hub keeps."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sftmix.disk.places import refuse_stranger
from sftmix.words.errors import DataError

HUB = "hub:"
"""The prefix of a data set's name on the hub, in places that also take a path."""

SHARED_FILES = ("dynamics.parquet", "rows.parquet")
"""What is read of shared scores: the dynamics by id, and the hash of the text of each id."""


def hub_name(path: str) -> str:
    """Return the NAME or NAME@REVISION behind `hub:`, or an empty text for any other path."""
    return path.removeprefix(HUB) if path.startswith(HUB) else ""


@cache
def fetched_scores(name: str) -> Sequence[str]:
    """Return the local paths of SHARED_FILES; they are downloaded unless the newest are there.

    name  of the data set; NAME@REVISION takes the files of a commit, branch or tag
    Without a network those that were downloaded before are taken. Raises DataError if there are none.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = refuse_stranger(name).partition("@")  # me/scores@main; the name of a repository has no @
    try:
        place = snapshot_download(
            repository, repo_type="dataset", revision=revision or None, allow_patterns=list(SHARED_FILES)
        )
    except (OSError, ValueError) as error:  # no such name, no access, no network, a name that no hub takes
        raise DataError(f"reference.path: {HUB}{name} cannot be fetched: {' '.join(str(error).split())}") from error
    files = [Path(place) / file for file in SHARED_FILES]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(
            f"reference.path: {HUB}{name} has no {', '.join(missing)}; name scores that "
            "`sftmix.tools.sharing.cards.write_scores` has written"
        )
    return [str(file) for file in files]
