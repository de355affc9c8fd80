"""The command line: `sftmix COMMAND`, `python cli.py COMMAND` and `torchrun cli.py COMMAND` do the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sftmix import __version__
from sftmix.common.errors import (
    INTERRUPTED,
    OUTPUT_CLOSED,
    ConfigError,
    SFTMixError,
    Stopped,
    closed_outputs,
    nearest,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`sftmix.common.errors`); unexpected exceptions keep their traceback."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        closed = closed_outputs()
        if not closed:
            raise
        with open(os.devnull, "w") as nothing:  # what is still to be written when the interpreter ends
            for descriptor in closed:
                os.dup2(nothing.fileno(), descriptor)
        return OUTPUT_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `--splitter my_module.MySplitter` finds the user's module, and shadows nothing
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except SFTMixError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        if _rank() == 0:
            print("interrupted; the same command continues the run", file=sys.stderr)
        return INTERRUPTED


def _dispatch(argv: list[str]) -> int:
    from sftmix.cli.commands import COMMANDS

    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
        print(_OVERVIEW.format(version=__version__, commands=lines))
        return 0 if argv else ConfigError.exit_code
    if argv[0] in ("--version", "-V"):
        print(f"sftmix {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}.{nearest(argv[0], COMMANDS)}")
    try:
        COMMANDS[argv[0]].main(argv[1:])
    except SystemExit as leave:  # --help and --print_config
        return int(leave.code or 0)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report(error: SFTMixError) -> None:
    """Print one message per run: rank 0 prints an error that all ranks share, and any rank one of its own."""
    rank = _rank()
    if rank and (error.everywhere or isinstance(error, ConfigError | Stopped)):
        return
    where = f"[rank {rank}] " if rank else ""
    kind = "stopped" if isinstance(error, Stopped) else "error"
    print(f"{where}{kind}: {error}", file=sys.stderr, flush=True)


_OVERVIEW = """sftmix {version}: instruction tuning with confidence-guided Mixup (arXiv 2410.05248)

usage: sftmix COMMAND [options]        sftmix COMMAND --help

{commands}

New here? `sftmix quickstart`. Then your own data:
  sftmix run --model.path NAME --data.train rows.json --data.eval_fraction 0.05 --out runs/first"""
