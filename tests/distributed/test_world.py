"""Ranks that end with an error end at once; each has a device of its own, and waits as long as it is told."""

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from sftmix.options import TrainingOptions
from sftmix.ranks import world as worlds
from sftmix.ranks.launcher import launch_problem
from sftmix.ranks.world import World
from sftmix.tools.verify.window import same_bits
from sftmix.training.machine import machine_of
from sftmix.training.mesh import mesh_of
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import resolve_parallel, resolve_precision, wrap
from sftmix.words.errors import ConfigError, HangError
from tests.forked import _forked, ended, free_port, on_ranks
from tests.tiny import ROOT
from tests.tiny import sftmix as command
from tests.toy import toy_model

ENDINGS = """
import os, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from sftmix.words.errors import Stopped
from sftmix.ranks.world import start_world

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on one core threads often stop between two steps

def stopped():
    with start_world() as world:
        module = DistributedDataParallel(torch.nn.Linear(4, 4))
        world.share(module is None)
        raise Stopped

for port in sys.argv[1:]:
    os.environ["MASTER_PORT"] = port
    try:
        stopped()
    except Stopped:
        pass
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_end_of_a_wrapped_model_does_not_hang():
    """Without a reference to the process group it does, within a hundred endings."""
    ports = [str(free_port()) for _ in range(100)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENDINGS, *ports]
    ranks = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def all_groups_wait_equally(world) -> None:
    getattr(dist, "set_timeout", _set_pg_timeout)(timedelta(seconds=77))
    module = TrainingModule(toy_model())
    wrap(module, parallel="hsdp", precision="fp32", world=world, shard_group_size=2)
    mesh = module.model.lm_head.weight.device_mesh
    groups = [dist.group.WORLD, *mesh.get_all_groups()]
    assert [group._get_backend(world.device).options._timeout.total_seconds() for group in groups] == [77] * 3
    there = len(dist.distributed_c10d._world.pg_map)
    wrap(TrainingModule(toy_model()), parallel="hsdp", precision="fp32", world=world, shard_group_size=2)
    assert len(dist.distributed_c10d._world.pg_map) == there  # a group lives to the end of the process


@pytest.mark.slow
def test_the_groups_of_hsdp_wait_as_long_as_all_ranks_and_serve_all_models():
    on_ranks(all_groups_wait_equally, ranks=4)


def unequal_nodes(world) -> None:
    world = replace(world, local_size=2 if world.rank < 2 else 1)  # 4 is divisible by both
    with pytest.raises(ConfigError, match=r"1 to 2 ranks.*training\.shard_group_size to a divisor.*or use fsdp"):
        wrap(TrainingModule(toy_model()), parallel="hsdp", precision="fp32", world=world)
    wrap(TrainingModule(toy_model()), parallel="hsdp", precision="fp32", world=world, shard_group_size=2)


@pytest.mark.slow
def test_nodes_of_unequal_size_do_not_wait_for_each_other():
    on_ranks(unequal_nodes, ranks=4)


def on_a_gpu() -> None:
    worlds._device = lambda local_rank: torch.device("cuda", local_rank)


@pytest.mark.slow
def test_a_rank_without_the_gpu_that_others_have_is_refused(tiny, tmp_path):
    """Precision, sharding and loading are decided by the device: their collectives would not fit together."""
    words = ["run", *tiny.bare, "--objective", "NTP", "--out", "run"]
    it = ended(words, cwd=tmp_path, faults=[on_a_gpu, None])
    assert 2 in it.codes
    host = socket.gethostname()
    assert f"devices of different kinds: cpu on {host}, cuda on {host}. A node that shows no GPU" in it.printed


def two_nodes() -> None:
    del os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    with worlds.start_world() as world:
        assert world.local_size == 2


def test_ranks_of_a_launcher_that_does_not_say_how_many_are_on_a_node():
    processes = _forked(two_nodes, [()] * 4, world=True)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4


# ------------------------------------------------------------------------------------------- half an environment


WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
"""What torchrun sets, but for the port."""


@pytest.fixture
def environment(monkeypatch):
    """Set these variables of torchrun, and no others."""
    for name in (*WHOLE, "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return lambda given: [monkeypatch.setenv(name, value) for name, value in given.items()]


@pytest.mark.parametrize("number", range(2**5 - 1))
def test_a_part_of_an_environment_is_refused_with_its_variables(number, environment):
    whole = WHOLE | {"MASTER_PORT": "29500"}
    given = {name: value for place, (name, value) in enumerate(whole.items()) if number >> place & 1}
    environment(given)
    if not given.keys() & {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:  # an address alone makes no rank of a process
        assert launch_problem() is None
        return
    with pytest.raises(ConfigError) as raised, worlds.start_world():
        pass
    assert all(f"{name}={value}" in str(raised.value) for name, value in given.items())
    assert all(name in str(raised.value) for name in whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("2", "-1", "x", "")),
        *(("LOCAL_RANK", value) for value in ("2", "-1", "0.5")),
        *(("WORLD_SIZE", value) for value in ("0", "-2", "two")),
        *(("MASTER_PORT", value) for value in ("", "http", "-1")),
        ("MASTER_ADDR", ""),
    ],
)
def test_numbers_that_do_not_fit_are_refused(name, value, environment):
    environment(WHOLE | {"MASTER_PORT": "29500"})
    assert launch_problem() is None
    environment({name: value})
    assert f"{name}={value}" in str(launch_problem())


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "one", "WORLD_SIZE": "2"},
        *(pytest.param(given, marks=pytest.mark.long) for given in ({"RANK": "1"}, {"WORLD_SIZE": "2"})),
    ],
)
def test_a_command_in_such_an_environment_tells_it_once(given, environment, tiny, tmp_path):
    environment(given)
    done = command("run", *tiny.options, "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "go together. Start with torchrun" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_stays_alone_says_for_whom_it_waited(rank, environment):
    environment(WHOLE | {"MASTER_PORT": str(free_port()), "RANK": rank})
    said = rf"rank {rank} of 2 .* did not meet the others .* training.timeout is 1 s"
    with pytest.raises(HangError, match=said), worlds.start_world(timeout=1.0):
        pass


# ------------------------------------------------------------------------------------------- GPUs, without one


@pytest.mark.parametrize(("kind", "variable"), [("cuda", "CUDA_VISIBLE_DEVICES"), ("xpu", "ZE_AFFINITY_MASK")])
@pytest.mark.parametrize(
    ("local_rank", "there", "shown", "index"),
    [(0, 1, None, 0), (3, 8, None, 3), (3, 1, "3", 0), (2, 1, None, None), (2, 2, "4,5", None)],
    ids=["one", "all", "own", "one of all", "few"],
)
def test_a_rank_takes_the_gpu_that_is_its_own(kind, variable, local_rank, there, shown, index, monkeypatch):
    """A scheduler that binds a GPU to each task shows one to each rank, and it has the number 0."""
    taken: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: there)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    for name in worlds._SHOWN:
        monkeypatch.delenv(name, raising=False)
    if shown:
        monkeypatch.setenv(variable, shown)
    if index is None:
        with pytest.raises(
            ConfigError, match=rf"rank 2 of this node has no GPU: .* {there},.*per_node {there}\)"
        ) as error:
            worlds._device(local_rank)
        assert not error.value.everywhere
    else:
        assert worlds._device(local_rank) == torch.device(kind, index)
        assert taken == [index]


def groups_across_hosts(world: World) -> None:
    """Four ranks of two hosts, numbered in turns, as srun --distribution=cyclic does; then host by host."""
    name = socket.gethostname
    sharing = {"parallel": "hsdp", "precision": "fp32"}
    world = replace(world, local_size=2)
    for hosts, group, refused in (("abab", None, True), ("aabb", None, False), ("abab", 4, False), ("aabb", 1, False)):
        socket.gethostname = lambda hosts=hosts: hosts[world.rank]
        mesh_of.cache_clear()
        expected = pytest.raises(ConfigError, match=r"the 2 ranks from 0 on .* they are on a, b: .*distribution=block")
        with expected if refused else contextlib.nullcontext():
            wrap(TrainingModule(toy_model()), world=world, shard_group_size=group, **sharing)
    socket.gethostname = name


@pytest.mark.long
@pytest.mark.slow
def test_a_group_of_hsdp_is_on_no_more_hosts_than_it_needs():
    on_ranks(groups_across_hosts, ranks=4)


LATE = """
import os, sys, time
from sftmix.ranks.world import start_world

for start in range(3):
    if os.environ["RANK"] == sys.argv[1]:
        time.sleep(2 * start)
    with start_world(30.0) as world:
        assert world.sum([1.0, world.rank]) == [3.0, 3.0]
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "2"])
@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_rank_may_be_late_for_the_next_start_in_one_process(late, by_torchrun, tmp_path):
    """The addresses of the start before, at which nobody listens, would be waited for until the timeout."""
    (tmp_path / "late.py").write_text(LATE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [str(tmp_path / "late.py"), late]
    if by_torchrun:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "3", "--rdzv_endpoint", "localhost:0"]
        launcher += ["--rdzv_backend", "c10d"]
        ranks = [subprocess.Popen([sys.executable, *launcher, *words], env=environment)]
    else:
        environment |= {"WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        of_rank = [environment | {"RANK": rank, "LOCAL_RANK": rank} for rank in "012"]
        ranks = [subprocess.Popen([sys.executable, *words], env=one) for one in of_rank]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * len(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("kind", [None, torch.device("mps")])
def test_without_a_gpu_that_has_float64_the_cpu_computes(kind, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: kind)
    assert [worlds.accelerator(), worlds._device(3)] == [torch.device("cpu")] * 2


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_bf16_that_a_gpu_only_emulates_is_not_taken(kind, monkeypatch):
    device = torch.device(kind, 0)
    monkeypatch.setattr(getattr(torch, kind), "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision("auto", device) == "fp32"
    assert resolve_precision("bf16", device) == "bf16"
    monkeypatch.setattr(getattr(torch, kind), "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision("auto", device) == "bf16"


@pytest.mark.parametrize(
    ("kind", "hip", "recorded"),
    [("cpu", "7.0", None), ("cuda", None, "13.0"), ("cuda", "7.0", "7.0"), ("xpu", None, "xpu")],
)
def test_a_gpu_of_any_maker_is_recorded_and_promises_no_bits(kind, hip, recorded, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None if hip or kind == "xpu" else "13.0")
    monkeypatch.setattr(torch.version, "hip", hip)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "get_device_name", lambda device: f"one on {device}")
    own = machine_of(World(device=torch.device(kind, 0)), TrainingOptions())
    assert own["cuda"] == recorded
    assert own["device"].startswith("cpu " if kind == "cpu" else f"one on {kind}:0")
    assert same_bits([own], own) == (kind == "cpu")
    assert resolve_parallel("auto", World(size=2, device=torch.device(kind, 0))) == ("ddp" if kind == "cpu" else "fsdp")


@pytest.mark.parametrize(("kind", "left"), [("cpu", False), ("cuda", True), ("xpu", True)])
def test_after_an_error_the_process_group_of_gpus_is_left_alone(kind, left, monkeypatch):
    """Its end would wait for the other ranks, before anybody hears of the error; a CPU's is destroyed."""
    start, backends = dist.init_process_group, []
    monkeypatch.setattr(worlds, "_device", lambda local: torch.device(kind))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **more: [backends.append(backend), start("gloo", **more)]
    )
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(ValueError, match="of one rank"), worlds.start_world():
        raise ValueError("of one rank")
    assert backends == [{"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}[kind]]
    assert dist.is_initialized() == left
    if left:
        dist.destroy_process_group()
