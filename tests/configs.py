"""Configurations as the command line reads them from files."""

from contextvars import copy_context
from pathlib import Path

from sftmix.cli.parsing import parse, read_arguments
from sftmix.config import RunConfig


def read_config(path: str | Path, *words: str) -> RunConfig:
    """Return the configuration of a file and its bases, and of what else is on the command line."""
    arguments = read_arguments([f"--config={path}", *words])
    return copy_context().run(parse, arguments)[0]  # what names mean ends with the command
