"""`quickstart`: the whole recipe on rows and a model made on the spot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sftmix.cli.results import say
from sftmix.cli.words import read_words
from sftmix.common.errors import ConfigError

ABOUT = """See the whole recipe work in under three minutes on two CPU cores, without any download.

It generates a small synthetic instruction set whose truth about confidence is known, makes a tokenizer and a small
Llama on the spot, and trains SFTMix beside plain NTP at the same seed. Each stage says what happened; the table at the
end shows whatever came out.

  sftmix quickstart"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="where to write [%(default)s]")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of everything [%(default)s]")


def main(argv: Sequence[str]) -> None:
    """Claim the directory, make rows and a model, and run."""
    given = read_words("quickstart", ABOUT, add_options, argv)
    say(f"quickstart: a small model on rows of known truth, in {given.out}")
    _claim(Path(given.out), given.seed)
    from sftmix.tools.quickstart.run import quickstart

    quickstart(given.out, given.seed)


def _claim(out: Path, seed: int) -> None:
    """Mark a directory as a quickstart's with this seed; raise ConfigError if it holds anything else."""
    marker = out / ".quickstart"
    if marker.exists():
        theirs = marker.read_text(encoding="utf-8").strip()
        if theirs != str(seed):
            raise ConfigError(f"{out} holds the quickstart of seed {theirs}, not {seed}; choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something that the quickstart did not write; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{seed}\n", encoding="utf-8")
