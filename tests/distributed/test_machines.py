"""Two nodes, each a torchrun with one rank: what they share, what each has alone, and a node that goes and comes.

Nodes that are hosts of their own: tests/distributed/test_two_hosts.py.
"""

import json
import os
import re
import shutil
import socket
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import pytest

from sftmix.model.load import fingerprint
from sftmix.pipeline.nodes import check_same, check_same_directory
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError, DataError
from tests.distributed.agents import Agent, start_agent, wait_until
from tests.faults.runs import from_split, words_of
from tests.forked import done, free_port, on_ranks
from tests.tiny import SHORT, Tiny, metrics, status

BUILDS = """
import os, sys

def note(event, given):
    kinds = (".tmp-rows-", ".tmp-tokens-", ".tmp-template-")
    if event == "tempfile.mkdtemp" and os.path.basename(given[0]).startswith(kinds):
        with open(os.environ["BUILDS"], "a") as file:
            file.write(os.path.basename(given[0]).split("-")[1] + "\\n")

sys.addaudithook(note)
"""
"""Python runs it when it starts (sitecustomize): it notes each directory that is begun in a cache."""


# ------------------------------------------------------------------------------------------------ what nodes share


def two_nodes(tiny: Tiny, place: Path, caches: tuple[str, str]) -> list[Agent]:
    """Run on two nodes, each in a directory of its own; note what each builds in its cache."""
    port, agents = free_port(), []
    (place / "sitecustomize.py").write_text(BUILDS)
    for name, cache in zip(("one", "two"), caches, strict=True):
        (place / name).mkdir()
        env = {"SFTMIX_CACHE": str(place / cache), "BUILDS": str(place / f"{name}.txt"), "PYTHONPATH": str(place)}
        words = ["split", *tiny.options, "--splitter", "RandomSplit", "--out", "../run"]
        agents.append(start_agent(words, cwd=place / name, port=port, env=env))
    for agent in agents:
        agent.wait()
    return agents


def built(place: Path) -> list[list[str]]:
    """What each node has built, sorted."""
    files = [place / f"{name}.txt" for name in ("one", "two")]
    return [sorted(file.read_text().split()) if file.exists() else [] for file in files]


WORK = ["rows", "rows", "tokens", "tokens"]
"""What there is to do: checked rows and token ids of two files."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("caches", [("one/cache", "two/cache"), ("cache", "cache")], ids=["own caches", "one cache"])
def test_rows_are_tokenised_once_for_each_cache(plain, tmp_path, caches):
    agents = two_nodes(plain, tmp_path, caches)
    assert [agent.process.returncode for agent in agents] == [0, 0], agents[0].printed + agents[1].printed
    # Rank 0 may be on either node.
    assert ["has joined with ranks 1 to 1 of 2" in agent.printed for agent in agents].count(True) == 1
    if caches[0] == caches[1]:
        assert sorted(chain(*built(tmp_path))) == WORK
    else:
        assert built(tmp_path) == [WORK, WORK]
    assert status(tmp_path / "run")["exit_code"] == 0


@pytest.mark.slow
def test_each_node_works_first_and_all_hear_of_its_error(tmp_path):
    on_ranks(_as_nodes, str(tmp_path), ranks=3)


def _as_nodes(world: World, place: str) -> None:
    """Three ranks: the first is a node, the others are another."""
    host, node = os.uname().nodename, min(world.rank, 1)
    world = replace(world, local_rank=max(world.rank - 1, 0), local_size=1 + node)
    two = f"node 1 ({host}, from rank 1)"

    def work() -> bool:
        file, first = Path(place, f"made-{node}"), world.local_rank == 0
        assert file.exists() != first  # the first rank makes it, and the second finds it
        file.touch()
        return first

    def fail(*, on: tuple[int, ...]) -> None:
        if node in on:
            raise DataError("no rows")

    assert world.node_first(work) == (world.local_rank == 0)
    for nodes, told in (((0, 1), "no rows"), ((1,), f"{two}: no rows")):
        with pytest.raises(DataError) as error:
            world.node_first(partial(fail, on=nodes))
        assert (str(error.value), error.value.everywhere) == (told, True)

    check_same(lambda: {"data.train": "a", "data.eval": "b"}, world)
    said = "data.eval: what this node reads, the tokenizer included, is b1, and on the first node b0. Give every"
    with pytest.raises(ConfigError, match=re.escape(f"{two}: {said}")):
        check_same(lambda: {"data.train": "a", "data.eval": f"b{node}"}, world)

    model = Path(place, f"model-{node}")
    for weights in ("equal", f"own-{node}"):  # of one size: their content counts
        model.mkdir(exist_ok=True)
        (model / "model.safetensors").write_text(weights)
        if weights == "equal":
            check_same(lambda: {"model.path": fingerprint(str(model))}, world)
    with pytest.raises(ConfigError, match=re.escape(f"{two}: model.path: what this node reads")):
        check_same(lambda: {"model.path": fingerprint(str(model))}, world)

    check_same_directory(Path(place), world)
    own = Path(place, f"own-{node}")
    own.mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=re.escape(f"{two}: out: {place}/own-1 is not the run directory")):
        check_same_directory(own, world)
    world.barrier()
    assert not list(Path(place).rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("option", ["model.path", "reference.model.path"])
def test_nodes_with_two_commits_of_a_hub_model_train_no_blend(plain, tmp_path, option):
    """Rows and tokenizer are equal; refused before anything is made."""
    port, agents, commits = free_port(), [], ("a" * 40, "b" * 40)
    for name, commit in zip(("one", "two"), commits, strict=True):
        repository = tmp_path / name / "hub" / "models--some--base"
        shutil.copytree(plain.model, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        words = ["run", *plain.options, *SHORT, f"--{option}", "some/base", "--training.parallel", "fsdp"]
        env = {"HF_HUB_CACHE": str(tmp_path / name / "hub"), "HF_HUB_OFFLINE": "1"}
        agents.append(start_agent([*words, "--out", "../run"], cwd=tmp_path / name, port=port, env=env))
    assert [agent.wait() != 0 for agent in agents] == [True, True], agents[0].printed
    message = f"{option}: what this node reads, the tokenizer included, is some/base@"
    assert message in agents[0].printed, agents[0].printed
    assert status(tmp_path / "run")["exit_code"] == 2
    assert not (tmp_path / "run" / "reference" / "checkpoints").exists()
    assert not (tmp_path / "run" / "train").exists()


# ----------------------------------------------------------------------------------------- a node that goes and comes

SAMPLES = '''
import json, os, time
from pathlib import Path
from sftmix.components import Callback
from sftmix.training.signals import StopSignal

class Samples(Callback):
    """Writes down the examples of each step, of all ranks; waits for what is done to the nodes."""
    gives = frozenset()
    def on_step_end(self, state):
        if state.stage != "train":
            return
        parts = state.read(lambda hidden, head, batch, plan: list(batch.ids))
        if state.is_main:
            with open("samples.jsonl", "a") as file:
                ranks = int(os.environ.get("WORLD_SIZE", 1))
                file.write(json.dumps([state.step, ranks, sorted(sum(parts, []))]) + "\\n")
        if "NODE" not in os.environ:
            return
        stop, deadline = StopSignal("at_step"), time.monotonic() + 240
        while state.step == WAITS.get(os.environ["NODE"] + os.environ["WORLD_SIZE"]) and not stop.received:
            Path(f"waits-{state.step}").touch()
            assert time.monotonic() < deadline
            time.sleep(0.05)

WAITS = {"two2": 5, "one1": 8}  # step 5 on two nodes: the second is killed; step 8 on one: another one joins
'''
SLOWLY = ("--training.learning_rate", "0.001", "--callbacks+", "samples.Samples")


@pytest.mark.slow
@pytest.mark.long
def test_a_node_is_killed_and_another_one_joins(plain, tmp_path):
    """Beside the uninterrupted run on one rank, in `alone`."""
    alone, port = tmp_path / "alone", free_port()
    alone.mkdir()
    for place in (alone, tmp_path):
        (place / "samples.py").write_text(SAMPLES)
    done(words_of(plain, *SLOWLY), cwd=alone)
    from_split(alone / "run", tmp_path)

    def agent(name: str) -> Agent:
        env = {"NODE": name, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return start_agent(words_of(plain, *SLOWLY), cwd=tmp_path, port=port, nodes="1:2", restarts=3, env=env)

    first = agent("one")
    wait_until(lambda: answers(port))  # it has the store, and outlives the other
    second = agent("two")
    wait_until((tmp_path / "waits-5").exists)
    second.kill()
    wait_until((tmp_path / "waits-8").exists)
    third = agent("three")
    assert (first.wait(), third.wait()) == (0, 0), first.printed + third.printed

    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    expected = {step: ids for step, _, ids in map(json.loads, (alone / "samples.jsonl").read_text().splitlines())}
    assert {step: ids for step, _, ids in found} == expected
    assert all(ids == expected[step] for step, _, ids in found)  # those that were made twice, too
    steps = [(step, ranks) for step, ranks, _ in found]
    assert steps == [*((s, 2) for s in range(1, 6)), *((s, 1) for s in range(4, 9)), *((s, 2) for s in range(9, 13))]
    pairs = zip(metrics(tmp_path / "run"), metrics(alone / "run"), strict=True)
    assert max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs) <= 1e-4


def answers(port: int) -> bool:
    """Return True if a process listens on a port of this machine."""
    with socket.socket() as caller:
        return caller.connect_ex(("localhost", port)) == 0
