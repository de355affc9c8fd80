"""An upload to a hub, by huggingface_hub: HF_ENDPOINT names the hub, `hf auth login` or HF_TOKEN the user."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sftmix.common.errors import ConfigError


def push(directory: Path, name: str, *, kind: Literal["model", "dataset"], private: bool = False) -> str:
    """Upload a directory to a repository, which is made if it is not there; return the address of the commit.

    private  of a new repository; one that is there stays as it is
    Raises ConfigError with the hub's reason: a wrong name, no token, no right to write, no network.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=name, folder_path=directory, repo_type=kind, commit_message="sftmix")
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"--push_to_hub {name}: {reason}; is the name OWNER/NAME, and are you logged in (hf auth login)?"
        ) from error
    return str(done.commit_url)
