"""The errors a user can meet, each with the exit code of the command line.

0 done, 1 unexpected, or another rank hangs, 2 usage, configuration or changed inputs, 3 bad data,
4 own checkpoint unreadable or unwritable, or a run that is not what it recorded, 5 directory in use,
6 non-finite numbers or a leap of the loss, 7 no space,
130 interrupted by Ctrl-C, 141 done, but nobody read the output to its end, 143 stopped by a signal with a checkpoint
saved.
"""

import difflib
from collections.abc import Iterable, Sequence


class SFTMixError(Exception):
    """Base class: a message for people (the problem, the value, the remedy) and an exit code."""

    exit_code = 1
    everywhere = False
    """True if every rank raises this error, so that one rank's message is enough.

    A class presumes it, of the errors that ranks raise at the same place; of one error, whoever raises it knows.
    """


class ConfigError(SFTMixError):
    """A wrong option, options that exclude each other, or inputs that changed under a run."""

    exit_code = 2
    everywhere = True


class ContractError(ConfigError, AssertionError):
    """An answer of a component that its contract does not allow: it ends a run, and fails a test of the component."""


class DataError(SFTMixError):
    """Rows that cannot be read or used; the message lists `file:line: reason`."""

    exit_code = 3


class BadRow(ValueError):
    """Reason why a row cannot be used, for a message `file:line: reason`."""


class TemplateRefusal(ValueError):
    """Error of a chat template, or a renderer, that cannot write a conversation."""


class TokenizerFailure(DataError):
    """A tokenizer breaks down on a text."""


class CheckpointError(SFTMixError):
    """A checkpoint cannot be written or read, or none of those that exist is valid."""

    exit_code = 4
    everywhere = True


class DifferenceError(SFTMixError):
    """A replay, or the files of a run, say something else than the run recorded."""

    exit_code = 4
    everywhere = True


class InUseError(SFTMixError):
    """Another process holds the run directory."""

    exit_code = 5


class NonFiniteError(SFTMixError):
    """Loss, gradient or weights stopped being finite."""

    exit_code = 6
    everywhere = True


BROKEN = "the model is broken, or its training diverged: a lower training.learning_rate may help"
"""What scores that are not finite say of a model."""


class LossLeapError(NonFiniteError):
    """Raised by a callback that ends a run when the loss leaps, such as docs/examples/loss_spikes.py."""


class NoSpaceError(SFTMixError):
    """The disk is full."""

    exit_code = 7


class HangError(SFTMixError):
    """Another rank did not answer in time."""


class RankError(SFTMixError):
    """Another rank ended with an error: its words and its exit code."""


class Stopped(BaseException):
    """SIGTERM or SIGUSR1 arrived; if a model was being trained, a checkpoint was saved.

    Like KeyboardInterrupt no Exception: it is raised in the middle of whatever runs, and libraries that catch every
    Exception, as around an import, would take it for a failure of their own and go on.
    """

    exit_code = 143
    everywhere = True


INTERRUPTED = 130
"""Exit code after Ctrl-C."""
OUTPUT_CLOSED = 141
"""Exit code of a command that is done, whose output nobody read to its end, as in `sftmix status RUN | head -1`."""


def refuse(problems: Sequence[str], where: str) -> None:
    """Raise one ConfigError that lists every problem; do nothing if there is none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  - ".join([f"{len(problems)} problems in {where}", *problems]))


def nearest(word: str, allowed: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return the allowed word that is most like this one, from `cutoff` on, or "" if none is; `ntp` is near NTP."""
    by_small = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(word.lower(), by_small, n=1, cutoff=cutoff)
    return by_small[close[0]] if close else ""


def with_suggestion(problem: str, near: str, more: str) -> str:
    """Return `problem. Did you mean NEAR? More.`, or `problem; more.`: what helps most is first.

    near  of `nearest`
    more  what is allowed, without a full stop
    """
    return f"{problem}. Did you mean {near}? {more[:1].upper()}{more[1:]}." if near else f"{problem}; {more}."
