"""How a process ends: who prints an error, and with which code."""

import pytest

from sftmix.words.ends import end_of
from sftmix.words.errors import CheckpointError, ConfigError, DataError, HangError, NoSpaceError, RankError, Stopped

OWN, NODE, MAIN = "each rank", "the first rank of each node", "rank 0"
EVERYWHERE = DataError("read by rank 0, raised on all")
EVERYWHERE.everywhere = True
OF_ANOTHER = RankError("rank 1: no space")
OF_ANOTHER.exit_code = 7


@pytest.mark.parametrize(
    ("error", "code", "torchrun", "srun"),
    [
        (ConfigError("a"), 2, NODE, MAIN),
        (CheckpointError("a"), 4, NODE, MAIN),
        (EVERYWHERE, 3, NODE, MAIN),
        (Stopped("a"), 143, NODE, MAIN),
        (DataError("a"), 3, OWN, OWN),
        (NoSpaceError("a"), 7, OWN, OWN),
        (HangError("a"), 1, OWN, OWN),
        (OF_ANOTHER, 7, OWN, OWN),
        (KeyboardInterrupt(), 130, OWN, OWN),
        (ZeroDivisionError("a"), 1, OWN, OWN),
    ],
)
def test_whose_error_it_is_decides_who_prints_it(error, code, torchrun, srun):
    ends = [end_of(error, started_by=name) for name in ("torchrun", "another")]
    assert [(end.code, end.speaker) for end in ends] == [(code, torchrun), (code, srun)]
    assert ends[0].words == f"{type(error).__name__}: {error}"
