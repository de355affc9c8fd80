"""Two hosts, each with a name, an address and a network of its own: a link that is cut, a host that is lost.

The hosts are namespaces of this machine (tests/distributed/hosts.py).
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.agents import Agent, start_agent, wait_until
from tests.distributed.hosts import Host, two_hosts, why_not
from tests.faults.runs import assert_same, from_split, leftovers, steps, words_of
from tests.forked import SIGKILLED, done
from tests.tiny import Tiny, status

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

CUT = 6
"""Seconds for which a link is cut that is survived."""
TIMEOUT = 12
"""Seconds after which it is not (training.timeout)."""

GAVE_UP = f"another rank did not answer within {TIMEOUT} s (training.timeout)"

WAITS = '''
import os, socket, time
from pathlib import Path
from sftmix.components import Callback

class Waits(Callback):
    """Waits after the steps 4 and 8 until it is told to go on."""
    gives = frozenset()
    def on_step_end(self, state):
        place, go = Path(os.environ["SIGNS"]), Path(os.environ["SIGNS"], f"go-{state.step}")
        if state.stage == "train" and state.step in (4, 8):
            (place / f"at-{state.step}-{socket.gethostname()}").touch()
            while not go.exists():
                time.sleep(0.05)
'''


@pytest.fixture
def hosts(tmp_path) -> Iterator[dict[str, Host]]:
    with two_hosts(tmp_path) as both:
        yield both


class Job:
    """The same command on both hosts, each of which has a directory and a cache of its own."""

    def __init__(self, hosts: dict[str, Host], place: Path, words: list[str], *, restarts: int = 0) -> None:
        self.hosts, self.place, self.words, self.restarts = hosts, place, words, restarts
        (place / "waits.py").write_text(WAITS)
        self.agents = {name: self.start(name) for name in hosts}

    def start(self, name: str) -> Agent:
        own, place = self.place / name, str(self.place)
        own.mkdir(exist_ok=True)
        env = {"SFTMIX_CACHE": str(own / "cache"), "SIGNS": place, "PYTHONPATH": place, "GLOO_SOCKET_IFNAME": "eth0"}
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1" if self.restarts else "0"  # as docs/distributed.md says
        more = {"restarts": self.restarts, "before": self.hosts[name].enter}
        return start_agent(self.words, cwd=own, port=29500, store="one", env=env, **more)

    def reaches(self, step: int) -> None:
        wait_until(lambda: all((self.place / f"at-{step}-{name}").exists() for name in self.hosts), 120)

    def goes_on(self, step: int) -> None:
        (self.place / f"go-{step}").touch()

    def gives_up(self, *names: str) -> None:
        """Wait until the ranks of these hosts have told why they end; the launcher may still wait for the store."""
        wait_until(lambda: all(GAVE_UP in self.agents[name].printed for name in names), 4 * TIMEOUT)

    def wait(self) -> list[int]:
        return [agent.wait(120) for agent in self.agents.values()]

    @property
    def printed(self) -> str:
        return "\n".join(f"--- {name}\n{agent.printed}" for name, agent in self.agents.items())


def whole(tiny: Tiny, place: Path, parallel: str) -> tuple[Path, list[str]]:
    """The run of two ranks of one host; and the words of the same run in `place`, where its split is made already."""
    words, kept = words_of(tiny, "--training.parallel", parallel), place / "whole"
    kept.mkdir()
    done(words, cwd=kept, ranks=2)
    words[words.index("run", 1)] = str(from_split(kept / "run", place))
    return kept / "run", [*words, "--callbacks+", "waits.Waits", "--training.timeout", str(TIMEOUT)]


def test_a_short_cut_is_survived_and_a_long_one_ends_both(small, hosts, tmp_path):
    expected, words = whole(small, tmp_path, "fsdp")
    job, run = Job(hosts, tmp_path, words), tmp_path / "run"
    job.reaches(4)
    hosts["two"].link("down")
    job.goes_on(4)
    time.sleep(CUT)
    assert len(steps(run)) <= 4
    hosts["two"].link("up")
    job.reaches(8)

    hosts["two"].link("down")
    job.goes_on(8)
    job.gives_up("one", "two")
    assert status(run)["exit_code"] == 1
    hosts["two"].link("up")  # until then the launcher there waits for the store
    assert all(job.wait()), job.printed
    assert re.search(r"host +: one\n +rank +: 0 ", job.agents["one"].printed)
    assert f"[rank 1] error: {GAVE_UP}" in job.agents["two"].printed

    again = Job(hosts, tmp_path, words)
    assert again.wait() == [0, 0], again.printed
    assert_same(run, expected)
    assert leftovers(run) == []


def test_a_host_is_lost_and_comes_back(small, hosts, tmp_path):
    expected, words = whole(small, tmp_path, "ddp")
    job = Job(hosts, tmp_path, words, restarts=1)
    job.reaches(4)
    hosts["two"].lose()
    assert job.agents["two"].wait() == SIGKILLED
    job.goes_on(4)
    job.goes_on(8)
    job.gives_up("one")
    hosts["two"].link("up")
    job.agents["two"] = job.start("two")
    assert job.wait() == [0, 0], job.printed
    assert_same(tmp_path / "run", expected)
    assert leftovers(tmp_path / "run") == []
