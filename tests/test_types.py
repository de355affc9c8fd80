"""The records that travel between the stages."""

import numpy as np

from sftmix.types import UNPAIRED, Split


def test_a_split_gives_the_rows_of_its_groups_in_file_order():
    split = Split(group=np.asarray([2, 0, UNPAIRED, 1, 0, 2], dtype=np.int8), names=("high", "middle", "low"))
    assert split.confident.tolist() == [1, 4]
    assert split.rows(1).tolist() == [3]
    assert split.unconfident.tolist() == [0, 5]
    assert split.unpaired.tolist() == [2]
    assert split.rows(0).dtype == np.int64
    together = np.concatenate([split.rows(g) for g in (UNPAIRED, 0, 1, 2)])
    assert sorted(together.tolist()) == list(range(6))
