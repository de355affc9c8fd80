"""`verify`: some steps of a run made again, and compared with what the run wrote."""

import argparse
import json
import sys
from pathlib import Path

from sftmix.cli.say import say
from sftmix.common.errors import DifferenceError
from sftmix.tools.runs.read import add_trust
from sftmix.tools.runs.shown import rendered
from sftmix.tools.verify.window import NEAR, STEPS, TRAINED, refuse_too_few_ranks, window_of

ABOUT = """Check that a result is what its configuration says: make some steps of a run again, from one of its
checkpoints, and compare files, rows, model, examples, losses and weights with what the run wrote. Nothing is written
into the run.

  sftmix verify runs/first
  sftmix verify runs/first --from 0 --steps 5        from the base model
  sftmix verify runs/first --stage reference --json

It ends with 0 if all is the same, and with 4 if something differs."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, finished or not")
    parser.add_argument("--stage", choices=TRAINED, default="train", help="whose steps [%(default)s]")
    start = "step with a checkpoint, or 0: the model before training [the last with weights to compare after it]"
    parser.add_argument("--from", type=int, metavar="STEP", dest="start", help=start)
    steps = f"steps to make again [up to the next weights that the run kept; {STEPS} if they are over {NEAR} away]"
    parser.add_argument("--steps", type=int, metavar="N", help=steps)
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def main(args: argparse.Namespace) -> None:
    """Make the steps again and print the certificate; raise DifferenceError if something differs."""
    window = window_of(Path(args.run).expanduser(), args.stage, args.start, args.steps)
    refuse_too_few_ranks(window)
    say(f"verify: steps {window.start + 1} to {window.end} of {window.stage} of {window.run}")
    from sftmix.tools.verify.run import verify

    certificate = verify(window)
    lines = rendered("verify/certificate.txt", **certificate)
    say(json.dumps(certificate, indent=1) if args.json else lines, sys.stdout)
    if not certificate["same"]:
        raise DifferenceError(f"{window.run} is not what it recorded; see what differs above")
