"""The part of a checkpoint that a rank writes: `torch.distributed.checkpoint` plans it, and a thread may write it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from sftmix.disk.files import file_entry, let_others_read


class Part(dcp.HuggingFaceStorageWriter):
    """The part of a checkpoint that this rank writes, by the plan of all ranks.

    copied  True: the training goes on meanwhile, so that tensors of the host are copied as well
    """

    copied: bool

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[Any]]:
        """Bring what the plan asks for to the host, each tensor once, and write nothing yet."""
        self.file = Path(self.path, f"shard-{plan.storage_data['shard_index']:05d}.safetensors")
        self.tensors, offsets = dict[str, torch.Tensor](), dict[str, Any]()
        for item in plan.items:
            tensor: Any = planner.resolve_data(item)
            self.tensors[item.index.fqn] = tensor.detach().to("cpu", copy=self.copied).contiguous()
            offsets[item.index.fqn] = {"saved_offsets": item.tensor_data.chunk.offsets}  # type: ignore[union-attr]
        self.metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
        nothing = torch.futures.Future[list[Any]]()
        nothing.set_result([])
        return nothing

    def write(self) -> dict[str, Any]:
        """Write the file, if this rank has one, and return its entry in the manifest."""
        if not self.tensors:
            return {}
        save_file(self.tensors, self.file, self.metadata)
        let_others_read(self.file)
        self.tensors.clear()  # what was copied is not needed while it is hashed
        return {self.file.name: file_entry(self.file)}


def part_of(tensors: dict[str, Any], staging: Path, *, copied: bool, alone: bool) -> Part:
    """Return this rank's part of the tensors, on the host, not yet written into `staging`; all ranks call it together.

    copied  as of `Part`
    alone   there is one rank
    Raises the error of whichever rank has failed on every rank.
    """
    part = Part(str(staging), save_distributed=True)
    part.copied = copied
    with warnings.catch_warnings(action="ignore"):  # which says that this is a single process, as is intended
        try:
            dcp.save(tensors, storage_writer=part, no_dist=alone)
        except dcp.CheckpointException as failed:
            raise next(iter(failed.failures.values()))[0] from failed
    return part
