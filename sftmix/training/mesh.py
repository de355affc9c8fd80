"""The ranks of sharding: groups that share one copy of the weights, and the ranks that have the same part."""

import math
import socket
from functools import cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError


@cache
def mesh_of(ranks: dist.ProcessGroup, world: World, group: int) -> DeviceMesh:
    """Return the mesh of groups that share the weights, one for all models: they live, with NCCL's buffers, to the end.

    A single group, as of fsdp, is a mesh of all ranks: NCCL's mean over one rank, as between groups, may be wrong.

    Raises ConfigError if the groups would differ, as they would wait for each other until the timeout, or if one would
    be spread over more hosts than its ranks need.
    """
    smallest, largest = -world.max(-group), world.max(group)
    if smallest != largest:
        raise ConfigError(
            f"training.parallel hsdp: the nodes have {smallest:g} to {largest:g} ranks, and its groups are of one "
            "size; set training.shard_group_size to a divisor of the ranks of each node, or use fsdp"
        )
    if group == world.size:
        return init_device_mesh(world.device.type, (world.size,))
    hosts = world.gather(socket.gethostname())
    for first in range(0, world.size, group):
        among = dict.fromkeys(hosts[first : first + group])
        if len(among) > math.ceil(group / world.local_size):
            raise ConfigError(
                f"training.parallel hsdp: the {group} ranks from {first} on would share one copy of the weights, but "
                f"they are on {', '.join(among)}: number the ranks host by host (srun --distribution=block), or set "
                "training.shard_group_size to a divisor of the ranks of each host"
            )
    mesh = init_device_mesh(world.device.type, (world.size // group, group), mesh_dim_names=("replicate", "shard"))
    # Its groups would have torch's own timeout, whatever training.timeout says.
    timeout = ranks._get_backend(world.device).options._timeout
    set_timeout = getattr(dist, "set_timeout", _set_pg_timeout)  # public from torch 2.14 on
    for part in mesh.get_all_groups():
        set_timeout(timeout, part)
    return mesh
