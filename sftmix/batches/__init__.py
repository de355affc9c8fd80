"""Which examples are step s on this rank, as tensors.

    pairs    the groups and pairs of each epoch
    order    the global batch of each step
    deal     its ranks and micro-batches
    collate  the tensors of one micro-batch
    rows     data sets as all of these see them

Everything is a pure function of (pairs, lengths, seed, epoch): any rank can work out what every rank does, and a
resumed run needs nothing but the step number.
"""

from __future__ import annotations
