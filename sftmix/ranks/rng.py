"""Counter-based randomness: every draw is a pure function of its purpose.

`generator(seed, "lambda", step, id_c, id_u)` gives the same numbers on any rank, at any world size and after
any resume, because no state travels from one draw to the next.
"""

import hashlib

import numpy as np


def stable_hash(*parts: object) -> int:
    """Return a 128-bit hash of the parts, the same on every machine and Python version; numpy's count as Python's."""
    text = ""
    for part in parts:
        value = part.item() if isinstance(part, np.generic) else part
        written = str(value)
        text += f"{type(value).__name__}:{len(written)}:{written}"  # int:1:7str:6:lambda: no two keys give one text
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """Return a new Philox generator keyed by (seed, purpose, parts): epoch or step, then example ids."""
    return np.random.Generator(np.random.Philox(key=stable_hash(seed, purpose, *parts)))
