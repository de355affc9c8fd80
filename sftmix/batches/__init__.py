"""Which examples are step s on this rank, as tensors: pairs, the order of an epoch, micro-batches, collation.

Everything is a pure function of (pairs, lengths, seed, epoch): any rank can work out what every rank does, and a
resumed run needs nothing but the step number.
"""

from __future__ import annotations
