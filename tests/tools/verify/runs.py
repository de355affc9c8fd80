"""Runs to be verified, and changes to them; the fixtures on them are in conftest.py."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sftmix.cli import main
from sftmix.disk.files import file_entry, hashed, read_json, write_json
from tests.tiny import Tiny, make_tiny, metrics

WORDS = ("--training.max_steps", "6", "--checkpoint.every", "2", "--checkpoint.keep", "4")


@dataclass(frozen=True)
class Copy:
    """A finished run and its rows, to be changed; `edit` changes a file and mends the manifests that have its hash."""

    tiny: Tiny
    run: Path

    def edit(self, name: str, change: Callable[[Path], None]) -> None:
        file, stage = self.run / name, self.run / name.split("/")[0]
        change(file)
        manifest = read_json(stage / "MANIFEST.json")
        manifest["files"][str(file.relative_to(stage))] = file_entry(file)
        write_json(stage / "MANIFEST.json", hashed(manifest))
        for of_checkpoint in stage.glob("checkpoints/*/MANIFEST.json"):
            manifest, beside = json.loads(of_checkpoint.read_text()), f"../../{file.relative_to(stage)}"
            if beside in manifest["files"]:
                lines = file.read_bytes().splitlines(keepends=True)
                content = b"".join(lines[: manifest["step"]] if file.suffix == ".jsonl" else lines)
                manifest["files"][beside] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                del manifest["sha256"]
                of_checkpoint.write_text(json.dumps(hashed(manifest)))


def made(place: Path, *words: str, dropout: float = 0.1) -> Copy:
    """A run of six steps with checkpoints 2, 4 and 6 of train, and the same for the reference."""
    tiny, run = make_tiny(place, dropout=dropout), place / "run"
    options = tiny.bare if "Online" in words else tiny.options
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["run", *options, *WORDS, "--out", str(run), *words]) == 0
    return Copy(tiny, run)


def unfinished(run: Path, *, after: int) -> None:
    """Make of train what a kill after a checkpoint leaves."""
    for name in ("MANIFEST.json", "figures.json"):
        (run / "train" / name).unlink()
    shutil.rmtree(run / "train" / "model")
    for step in range(after + 1, 7):
        shutil.rmtree(run / "train" / "checkpoints" / f"step-0000000{step}", ignore_errors=True)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def one_bit_of_a_weight(file: Path) -> None:
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1).view(dtype=torch.int32)[7] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def with_line(step: int, name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change an entry of a step in metrics.jsonl."""

    def change_file(file: Path) -> None:
        lines = metrics(file.parents[1])
        lines[step - 1][name] = change(lines[step - 1][name])
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return change_file


def certified(sftmix, *words: str) -> SimpleNamespace:
    """Exit code and JSON of a verification."""
    done = sftmix("verify", *words, "--json")
    return SimpleNamespace(code=done.code, **json.loads(done.out))


def differing(found: SimpleNamespace) -> set[str]:
    return {finding["kind"] for finding in found.findings if finding["same"] is False}
