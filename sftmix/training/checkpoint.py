"""Atomic, verified checkpoints of model and optimizer: safetensors and JSON only.

`step-00000100/` holds the (sharded) tensors, written by torch.distributed.checkpoint as safetensors; `optimizer.json`
with the optimizer's numbers; `state.json` with the state of the loop; and MANIFEST.json, written last, with the SHA-256
of every file. A directory is a checkpoint if and only if its manifest verifies, so neither clocks nor atomic renames
are trusted. Tensors are stored by name, so a checkpoint of two ranks loads on one rank, and the other way round. For a
model with adapters, only the trained weights are stored; the rest belongs to the base model.
"""

import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sftmix.common.errors import CheckpointError, NonFiniteError
from sftmix.common.files import (
    BEST,
    commit_directory,
    fresh_directory,
    is_full,
    no_space,
    remove_leftovers,
    step_path,
    steps_in,
    verify_directory,
)
from sftmix.common.world import World
from sftmix.model.adapters import adapter_config
from sftmix.training.parallel import unwrap

_NUMBERS = "optimizer.json"
_ARRAYS = "arrays.st"
"""Named unlike *.safetensors, because torch's reader takes every such file for a part of the sharded tensors."""
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_MARGIN = 1.2
"""Bytes for each byte of an estimate: a checkpoint holds more than weights and the state of the optimizer."""


@dataclass
class CheckpointStore:
    """The checkpoints of one stage: `directory`/step-<8 digits>/."""

    directory: Path
    keep: int
    world: World
    _verified: int | None = None
    """The step that was read in full and compared with its hashes by this object, on rank 0."""

    def steps(self) -> list[int]:
        """Return the steps that have a directory, newest first, valid or not."""
        return steps_in(self.directory)

    def path(self, step: int) -> Path:
        return step_path(self.directory, step)

    def clean(self) -> None:
        """Remove leftovers of a process that was killed while saving; only for the holder of the run directory."""
        if self.world.is_main:
            remove_leftovers(self.directory)

    def save(
        self,
        step: int,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: Mapping[str, object],
        arrays: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the checkpoint of `step` from all ranks; readers see it once it is whole. Then keep the newest `keep`.

        optimizer  None: the weights alone, to export and not to resume from
        state      the state of the loop except tensors, as JSON
        arrays     more tensors, the same on every rank
        Raises NoSpaceError on every rank if the disk of any is full, CheckpointError if any cannot write for another
        reason, and NonFiniteError if a weight is not finite; earlier checkpoints are untouched.
        """
        module, path = unwrap(wrapped), self.path(step)
        self._refuse_not_finite(module, step)
        tensors, optimizer_state = _tensors(module, optimizer)
        needed = sum(t.numel() * t.element_size() for t in tensors.values())

        def begin() -> Path:
            with self._explained(step, needed):
                return fresh_directory(path)

        staging = self.world.from_main(begin)
        writer = dcp.HuggingFaceStorageWriter(str(staging), save_distributed=True)
        # Else all is copied through pinned memory of the host, which torch never gives back.
        writer.per_thread_copy_ahead = 0
        problem = None
        try:
            with warnings.catch_warnings(action="ignore"):  # that this is a single process, as is intended
                dcp.save(tensors, storage_writer=writer, no_dist=self.world.size == 1)
        except dcp.CheckpointException as failed:  # every rank has it, whichever failed
            problem = next(iter(failed.failures.values()))[0]
            if isinstance(problem, KeyboardInterrupt):
                raise problem from failed
        # Counters of single parameters, and values that an optimizer adapts in its groups.
        numbers = {k: v for k, v in optimizer_state.items() if isinstance(v, (int, float))}
        self.world.barrier()

        def commit() -> None:
            with self._explained(step, needed):
                if problem is not None:
                    raise problem
                (staging / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
                (staging / _NUMBERS).write_text(json.dumps(numbers, indent=1))
                if arrays:
                    (staging / _ARRAYS).write_bytes(save(dict(arrays)))
                commit_directory(staging, path, about={"step": step, "world_size": self.world.size})
                self._verified = None
                self._prune(step)

        self.world.on_main(commit)

    def _refuse_not_finite(self, module: nn.Module, step: int) -> None:
        """Raise NonFiniteError on every rank if a trained weight of any is not finite."""
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in _trained(module).values()]
        if self.world.max(any(not torch.isfinite(p).all() for p in shards)):
            raise NonFiniteError(
                f"weights are not finite after step {step}, so {self.path(step)} is not written; lower "
                "training.learning_rate (the last checkpoint is untouched)"
            )

    def _prune(self, step: int) -> None:
        """Remove all but `keep` checkpoints: first the ones of later steps, which were passed over as damaged."""
        others = sorted((s for s in self.steps() if s != step), key=lambda s: (s > step, -s))
        for old in others[self.keep - 1 :]:  # NFS keeps what is being read elsewhere; the next save tries again
            shutil.rmtree(self.path(old), ignore_errors=True)

    @contextmanager
    def _explained(self, step: int, needed: int) -> Iterator[None]:
        """Remove what was written of a checkpoint, to make room for the others, and raise why it cannot be written."""
        try:
            yield
        except Exception as error:
            self.clean()
            if is_full(error):
                raise no_space(self.path(step), needed) from error
            raise CheckpointError(
                f"{self.path(step)} cannot be written ({type(error).__name__}: {error}); the checkpoints before are "
                "untouched. Mend the cause, then the same command continues"
            ) from error

    def bytes_to_come(self, module: nn.Module, *, state_bytes: float, saves: int) -> int:
        """Return the bytes that the checkpoints to come take beside those that are there, at most at one time.

        The oldest one goes when the new one is there: once there are `keep`, one more must fit.

        state_bytes  bytes of the optimizer's state per trained number
        saves        number of checkpoints still to be saved, at least 1
        """
        each = sum(p.numel() * (p.element_size() + state_bytes) for p in _trained(module).values())
        return int(_MARGIN * each) * min(saves, max(1, self.keep + 1 - len(self.steps())))

    def newest_valid(self) -> int | None:
        """Return the newest step that verifies; None if there are no checkpoints.

        Raises CheckpointError if there are checkpoints, but all are damaged: never a silent fresh start.
        """

        def newest():
            for step in self.steps():
                problem = verify_directory(self.path(step))
                if problem is None:
                    self._verified = step
                    return step
                warnings.warn(f"skipping checkpoint {self.path(step)}: {problem}", stacklevel=2)
            if self.steps():
                raise CheckpointError(f"no checkpoint in {self.directory} is readable; move them away to start again")
            return None

        return self.world.from_main(newest)

    def state(self, step: int) -> dict[str, Any]:
        """Return the loop's state in `step`, as it was saved."""
        return json.loads((self.path(step) / "state.json").read_text())

    def arrays(self, step: int) -> dict[str, torch.Tensor]:
        """Return the loop's tensors in `step`; none if none were saved."""
        file = self.path(step) / _ARRAYS
        return load_file(file) if file.exists() else {}

    def load(self, step: int, wrapped: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Load `step` in place, at any world size; the weights only without an optimizer."""
        module = unwrap(wrapped)
        path = self.path(step)
        problem = None
        if self.world.is_main:  # files may be gone since they were hashed, if a run saves beside an export
            problem = verify_directory(path, hashes=step != self._verified)
        if problem := self.world.share(problem):
            raise CheckpointError(f"{path}: {problem}")
        (tensors, fresh), reader = _tensors(module, optimizer), dcp.HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
        if missing := sorted(tensors.keys() - stored.keys()):
            raise CheckpointError(
                f"{path} lacks {len(missing)} of {len(tensors)} tensors of this run, {missing[0]} first: it is of "
                "another model or of other adapters"
            )
        try:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        except dcp.CheckpointException as failed:  # which is no Exception; files went since they were verified
            error = next(iter(failed.failures.values()))[0]
            raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from failed
        # Not strict: a tied weight is there by one of its names, and frozen ones are not.
        set_model_state_dict(module, _of(tensors, "weights/"), options=StateDictOptions(strict=False))
        if optimizer is not None:
            state = json.loads((path / _NUMBERS).read_text())
            state |= _of(stored, "optimizer/") | _of(tensors, "optimizer/")
            if late := sorted(state.keys() - fresh.keys()):
                raise CheckpointError(
                    f"{path} holds optimizer/{late[0]}, for which the optimizer has no place; only a state that begins "
                    "with its first step can be resumed"
                )
            set_optimizer_state_dict(module, optimizer, fresh | state, options=_FLAT)


def full_weights(wrapped: nn.Module, *, gathered: bool = True) -> dict[str, torch.Tensor]:
    """Gather the weights of the wrapped causal language model on the CPU of rank 0; call it on every rank.

    These are all weights, tied ones under each of their names; with adapters, only those that are not frozen.

    gathered  False: the tensors of the model itself, to change in place; FSDP has its shards
    """
    module = unwrap(wrapped)
    adapted = adapter_config(module.model) is not None
    options = StateDictOptions(full_state_dict=gathered, cpu_offload=gathered, ignore_frozen_params=adapted)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    names = _trained(module) if adapted else state.keys()
    return {name.removeprefix("model."): state[name] for name in names if name in state}


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model and optimizer tensors by name, each storage once (a tied head is the embedding).

    The second part of the result is the whole state of the optimizer, with its numbers.
    """
    unique = set(_trained(module))
    if all(p.requires_grad for p in module.parameters()):
        unique |= {name for name, _ in module.named_buffers()}
    # First the weights: torch reshards what a forward has left gathered, which the optimizer does not know.
    tensors = {f"weights/{k}": v for k, v in get_model_state_dict(module).items() if k in unique}
    state = {} if optimizer is None else get_optimizer_state_dict(module, optimizer, options=_FLAT)
    return tensors | {f"optimizer/{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}, state


def _of(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


class BestWeights:
    """The weights of the best held-out evaluation so far, in STAGE/best, to export and not to resume from.

    A resumed stage goes on with those that it kept before.

    evaluated  the last step that had an evaluation
    """

    def __init__(self, stage: Path, world: World) -> None:
        self.store = CheckpointStore(stage / BEST, keep=1, world=world)
        self.evaluated, self._nll = -1, math.inf
        self.store.clean()
        try:
            if (step := self.store.newest_valid()) is not None:
                self._nll = self.store.state(step)["eval_nll"]
        except CheckpointError as error:  # the stage itself is not harmed
            warnings.warn(f"{error}; the best weights are looked for anew", stacklevel=2)

    def go_on(self, evaluations: Mapping[int, float]) -> None:
        """Take the evaluations so far of a resumed stage as beaten only by better ones, also without their weights.

        Weights of a worse one, kept before a part of the stage that kept none, are removed.
        """
        best = min(evaluations.values(), default=math.inf)
        if best < self._nll:
            self._nll = best
            if self.store.world.is_main:
                shutil.rmtree(self.store.directory, ignore_errors=True)
                print(f"checkpoint.keep_best: the best evaluation so far, {best:.4f}, has no weights kept")

    def offer(self, step: int, module: nn.Module, metrics: Mapping[str, float]) -> None:
        """Keep the weights after `step` if `metrics` has an evaluation of theirs, better than all before.

        All ranks call it; the metrics of rank 0, which writes the log, decide for all.
        """
        nll = self.store.world.share(metrics.get("eval_nll"))
        if nll is None:
            return
        self.evaluated = step
        if nll < self._nll:
            self._nll = nll
            self.store.save(step, module, None, {"eval_nll": nll})
