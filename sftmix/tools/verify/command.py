"""`verify`: some steps of a run made again, and compared with what the run wrote."""

import json
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from sftmix.cli.say import say
from sftmix.tools.runs.output import rendered
from sftmix.tools.runs.read import Reading
from sftmix.tools.verify.window import Trained, refuse_too_few_ranks, window_of
from sftmix.words.errors import DifferenceError

ABOUT = """Check that a result is what its configuration says: make some steps of a run again, from one of its
checkpoints, and compare files, rows, model, examples, losses and weights with what the run wrote. Nothing is written
into the run.

  sftmix verify runs/first
  sftmix verify runs/first --from 0 --steps 5        from the base model
  sftmix verify runs/first --stage reference --json

It ends with 0 if all is the same, and with 4 if something differs."""


@dataclass
class Options(Reading):
    run: str
    """RUN: run directory, finished or not"""
    _: KW_ONLY
    stage: Trained = "train"
    """whose steps [%(default)s]"""
    from_: int | None = None
    """STEP: step with a checkpoint, or 0: the model before training [the last with weights to compare after it]"""
    steps: int | None = None
    """N: steps to make again [up to the next weights that the run kept; 10 if they are over 50 away]"""
    json: bool = False
    """print JSON instead of lines"""


def main(args: Options) -> None:
    """Make the steps again and print the certificate; raise DifferenceError if something differs."""
    window = window_of(Path(args.run).expanduser(), args.stage, args.from_, args.steps)
    refuse_too_few_ranks(window)  # before torch is imported
    say(f"verify: steps {window.start + 1} to {window.end} of {window.stage} of {window.run}")
    from sftmix.tools.verify.run import verify

    certificate = verify(window)
    lines = rendered("verify/certificate.txt", **certificate)
    say(json.dumps(certificate, indent=1) if args.json else lines, sys.stdout)
    if not certificate["same"]:
        raise DifferenceError(f"{window.run} is not what it recorded; see what differs above")
