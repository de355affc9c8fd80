"""Counter-based randomness: every draw is a pure function of its purpose.

`generator(seed, "lambda", step, id_c, id_u)` gives the same numbers on any rank, at any world size and after
any resume, because no state travels from one draw to the next.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stable_hash(*parts: object) -> int:
    """Return a 128-bit hash of the parts, the same on every machine and Python version; numpy's count as Python's."""
    plain = (p.item() if isinstance(p, np.generic) else p for p in parts)
    fields = [(type(p).__name__, str(p)) for p in plain]
    text = "".join(f"{kind}:{len(value)}:{value}" for kind, value in fields)  # lengths: no two keys give one text
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """Return a new Philox generator keyed by (seed, purpose, parts): epoch or step, then example ids."""
    plain = (int(p) if isinstance(p, (int, np.integer)) else str(p) for p in parts)
    return np.random.Generator(np.random.Philox(key=stable_hash(int(seed), purpose, *plain)))
