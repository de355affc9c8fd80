"""Runs of a command in this process: those that must succeed, and those that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


class Made:
    """`made(command, *words)` is the run directory, `run` beside the tiny model unless `out` names another.

    printed  what the last command wrote to stdout
    """

    printed = ""

    def __init__(self, sftmix: Callable, place: Path) -> None:
        self.sftmix, self.place = sftmix, place

    def __call__(self, *words: str, out: str = "run") -> Path:
        done = self.sftmix(*words, "--out", str(self.place / out))
        assert done.code == 0, done.err
        self.printed = done.out
        return self.place / out


@pytest.fixture
def made(sftmix, tmp_path) -> Made:
    return Made(sftmix, tmp_path)


@pytest.fixture
def rows(tiny) -> list[dict]:
    """The training rows of the tiny model's directory, to be changed and written back."""
    return [json.loads(line) for line in tiny.train.read_text().splitlines()]


@pytest.fixture
def refused(sftmix, tmp_path) -> Callable[..., str]:
    """Run a command that must end with a code, and return what it says of the error."""

    def call(*words: str, code: int = 2, out: str = "run") -> str:
        done = sftmix(*words, "--out", str(tmp_path / out))
        assert done.code == code, done.err
        return done.err

    return call
