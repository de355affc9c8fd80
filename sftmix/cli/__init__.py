"""The command line: `sftmix COMMAND`, `python -m sftmix COMMAND` and `torchrun -m sftmix COMMAND` do the same."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from sftmix import __version__
from sftmix.cli.say import for_terminal, say
from sftmix.ranks.launcher import BY_TORCHRUN, end_with_launcher, first_rank_reports, launch_problem, record_error
from sftmix.words.ends import FIRST_OF_NODE, RANK_0, end_of
from sftmix.words.errors import (
    OUTPUT_CLOSED,
    ConfigError,
    DataError,
    NoSpaceError,
    SFTMixError,
    Stopped,
    nearest,
    with_suggestion,
)
from sftmix.words.shown import as_lines, as_printed


class Output(io.FileIO):
    """A descriptor whose writes do not fail. What cannot be written is lost, and `code` is the exit code for that."""

    code = 0

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.code = OUTPUT_CLOSED if isinstance(error, BrokenPipeError) else NoSpaceError.exit_code
            return len(data)  # as if written: print would raise, and Python would try again at its end


class Printer(io.TextIOWrapper):
    """Writes lines of ours and of libraries: what they quote, which may be from anyone, cannot control the terminal."""

    def write(self, text: str) -> int:
        super().write(as_printed(text))
        return len(text)


def outlast_readers() -> list[Output]:
    """Replace stdout and stderr by a Printer on an Output each; return the Outputs."""
    outputs = []
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        closed = getattr(sys, name) is None  # by who started this: what is opened next has its descriptor
        # backslashreplace: a file name that is not UTF-8 has characters that print refuses
        output = Output(os.devnull if closed else descriptor, "w", closefd=closed)
        setattr(sys, name, Printer(io.BufferedWriter(output), errors="backslashreplace", line_buffering=True))
        outputs.append(output)
    return outputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`sftmix.words.errors`); unexpected exceptions keep their traceback."""
    end_with_launcher()  # before anything that takes its time
    if not any(name.startswith("PYTORCH_") and name.endswith("ALLOC_CONF") for name in os.environ):
        # torch reads it when it is imported: lengths differ from step to step, and free memory has fewer gaps so.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    outputs = outlast_readers() if argv is None else []  # a caller in Python keeps its own
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as leave:  # --help and --print_config
        code = int(leave.code or 0)
    except (SFTMixError, Stopped) as error:
        code = _report(error)
    except KeyboardInterrupt as interrupt:
        say(
            "interrupted; the same command continues from what is finished, a run from its last checkpoint (SIGTERM "
            "saves one first)"
        )
        code = end_of(interrupt).code
    except Exception as error:
        from sftmix.config.schema import name_component  # after the command: it imports more

        name_component(error)
        record_error(end_of(error).words)
        raise
    sys.stdout.flush()  # before it is asked what was lost
    lost = [output.code for output in outputs if output.code]
    if NoSpaceError.exit_code in lost:
        print("error: no space left for what this command prints", file=sys.stderr)
    return code or max(lost, default=0)


def _dispatch(argv: list[str]) -> int:
    from sftmix.cli.commands import COMMANDS, call

    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:<10}  {command.summary}" for name, command in COMMANDS.items())
        print(_OVERVIEW.format(version=__version__, commands=lines))
        return 0 if argv else ConfigError.exit_code
    if argv[0] in ("--version", "-V"):
        print(f"sftmix {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        guess, listed = nearest(argv[0], COMMANDS), f"there are {', '.join(COMMANDS)}"
        raise ConfigError(with_suggestion(f"no command {argv[0]!r}", guess, listed))
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory was removed; change to one that is there") from None
    call(argv[0], argv[1:])
    return 0


def _report(error: SFTMixError | Stopped) -> int:
    """Print the message of an error, if it is for this rank to print (`SPEAKERS`), and return the exit code."""
    # RANK may be no number, which the error then says
    rank = 0 if launch_problem() else int(os.environ.get("RANK", "0"))
    kind = "stopped" if isinstance(error, Stopped) else "error"
    message = as_lines(f"{kind}: {error}")
    end = end_of(error, started_by="torchrun" if BY_TORCHRUN in os.environ else "another")
    if not (end.speaker == FIRST_OF_NODE and first_rank_reports(message)):
        if not (end.speaker == RANK_0 and rank):
            shown = for_terminal(message, sys.stderr) if isinstance(error, DataError) else message
            print(f"[rank {rank}] {shown}" if rank else shown, file=sys.stderr, flush=True)
        record_error(message)
    return end.code


_OVERVIEW = """sftmix {version}: instruction tuning with confidence-guided Mixup (arXiv 2410.05248)

usage: sftmix COMMAND [options]        sftmix COMMAND --help        sftmix run --help all

{commands}

New here? `sftmix quickstart`. Then your own data:
  sftmix run --model.path HuggingFaceTB/SmolLM2-135M-Instruct \\
    --data.train rows.jsonl --data.eval_fraction 0.1 \\
    --training.learning_rate 1e-4 --training.epochs 1 \\
    --with_baseline --out runs/first"""
