"""How a process ends with an error: its exit code, what STATUS.json says of it, and which ranks print it."""

from typing import NamedTuple

from sftmix.words.errors import INTERRUPTED

EACH_RANK, FIRST_OF_NODE, RANK_0 = "each rank", "the first rank of each node", "rank 0"

# torchrun ends all ranks as soon as one fails: the others wait for the words of the first. The ranks of srun hear
# nothing of each other.
SPEAKERS = {
    "of this rank": {"torchrun": EACH_RANK, "another": EACH_RANK},
    "of all ranks": {"torchrun": FIRST_OF_NODE, "another": RANK_0},
}
"""Whose error it is -> what started the ranks -> who prints it. A RankError, of another rank, is of this rank.

Not asked for: Ctrl-C, which rank 0 alone says, and an unforeseen error, whose traceback each rank prints.
"""


class End(NamedTuple):
    """How a process ends.

    code     its exit code, also in STATUS.json
    words    of STATUS.json, and of the note for the other ranks
    speaker  who prints the message, of SPEAKERS
    """

    code: int
    words: str
    speaker: str


def end_of(error: BaseException, *, started_by: str = "another") -> End:
    """Return the end of a process that this error ends; `started_by` is torchrun or another."""
    code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    whose = "of all ranks" if getattr(error, "everywhere", False) else "of this rank"
    return End(code, f"{type(error).__name__}: {error}", SPEAKERS[whose][started_by])
