"""How fast steps are, beside the fastest so far: on a CPU that others use, threads that wait for each other crawl."""

import os
import subprocess
import sys
from threading import Timer
from typing import Any

from sftmix.ranks.world import World

WINDOW = 10.0
"""Seconds of steps of which a rate is made."""
FELL = 5
"""How many times slower than the best rate is slow."""
LASTS = 60.0
"""Seconds for which steps are slow before a line says so."""
WORTH = 1.2
"""How many times as fast a setting is that is named."""
LONGEST = 30.0
"""Seconds that a probe may take, most of them to import torch three times on cores that are busy."""
SETTINGS = {"": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Variables of the environment, and values that are tried; the first changes nothing."""
_PROBE = """
import sys, time, torch
width = int(sys.argv[1])
x, weight = torch.ones(256, width), torch.ones(width, width)
torch.nn.functional.gelu(x @ weight)
print("ready", flush=True)
sys.stdin.readline()
end, products = time.perf_counter() + 1, 0
while time.perf_counter() < end:
    torch.nn.functional.gelu(x @ weight)
    products += 1
print(products)
"""


class Pace:
    """The rates of the steps of one process; on a CPU it says once that they fell."""

    def __init__(self, world: World, model: Any) -> None:
        self.alone = world.size == 1
        self.model = model
        self.tokens = self.seconds = 0.0
        self.best = self.slow = 0.0
        self.said = world.device.type != "cpu"

    def after(self, tokens: int, seconds: float) -> str | None:
        """Note the tokens and seconds of a step; return the line that is due, or None.

        Before the line the run waits for a probe: beside its threads the probe would measure another load than the one
        that the run has. With several ranks there is no probe: the other ranks would wait as well.
        """
        self.tokens += tokens
        self.seconds += seconds
        if self.seconds < WINDOW:
            return None
        rate = self.tokens / self.seconds
        self.best = max(self.best, rate)
        self.slow = self.slow + self.seconds if rate * FELL <= self.best else 0.0
        self.tokens = self.seconds = 0.0
        if self.said or self.slow < LASTS:
            return None
        self.said = True
        faster = advice(probe(self.model.get_input_embeddings().weight.shape[1]) if self.alone else {})
        return (
            f"{rate:,.0f} tokens a second for a minute, and {self.best:,.0f} before: other programs compute on these "
            f"{os.cpu_count()} cores, and threads that wait for each other do little then: {faster}"
        )


def probe(width: int) -> dict[str, int]:
    """Return the products of [256, width] and [width, width] that a process makes in a second, by setting.

    Each setting has a process of its own, as threads are started once; they measure one after the other. None is left
    afterwards. A setting is missing if its process is not done within LONGEST seconds.
    """
    children: dict[str, Any] = {
        name: subprocess.Popen(
            [sys.executable, "-P", "-c", _PROBE, str(width)],
            env=os.environ | ({name: value} if name else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, value in SETTINGS.items()
    }
    limit = Timer(LONGEST, lambda: [child.kill() for child in children.values()])
    limit.start()
    try:
        for child in children.values():
            child.stdout.readline()
        made = {name: child.communicate("\n")[0] for name, child in children.items()}
        return {name: int(products) for name, products in made.items() if products}
    finally:
        limit.cancel()
        for child in children.values():
            child.kill()
            child.wait()


def advice(products: dict[str, int]) -> str:
    """Return which setting is the fastest, by the result of `probe`, which may be empty."""
    best = max(products.keys() - {""}, key=products.__getitem__, default="")
    if not best or "" not in products:
        return "the same command goes on faster with OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE in the environment"
    times = products[best] / max(1, products[""])
    if times < WORTH:  # as with one thread already
        return "but a probe was not much faster with other settings of threads"
    return f"a probe of a second was {times:.1f} times as fast with {best}={SETTINGS[best]} in the environment"
