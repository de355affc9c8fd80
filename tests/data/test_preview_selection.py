"""`preview` shows the rows that the selector keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from tests.tiny import make_tiny


def test_preview_shows_the_selected_rows(tmp_path: Path, sftmix: Callable[..., SimpleNamespace]) -> None:
    words = [*make_tiny(tmp_path).options, "--no_color", "--rows", "1000"]
    everything = sftmix("preview", *words)
    chosen = sftmix("preview", *words, "--selector", "Longest", "--selector.k", "3")
    assert (everything.code, chosen.code) == (0, 0)
    assert "examples selected by Longest" in chosen.out
    assert chosen.out.count("[[") == 3 < everything.out.count("[[")
