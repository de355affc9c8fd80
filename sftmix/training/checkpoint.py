"""Atomic, verified checkpoints of model and optimizer: safetensors and JSON only.

`step-00000100/` holds the (sharded) tensors, written by torch.distributed.checkpoint as safetensors; `optimizer.json`
with the optimizer's numbers; `state.json` and `arrays.st` with the state of the loop; and MANIFEST.json, written last,
with the SHA-256 of every file. A directory is a checkpoint if and only if its manifest verifies, so neither clocks nor
atomic renames are trusted. Tensors are stored by name, so a checkpoint of two ranks loads on one rank, and the other
way round. For a model with adapters, only the trained weights are stored; the rest belongs to the base model.

A thread of each rank writes and hashes its files, on a GPU while the training goes on. It calls no collective: ranks
agree between two steps that all files are there, and then rank 0 writes the manifest.
"""

import json
import shutil
import time
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from sftmix.disk.files import (
    commit_directory,
    file_entry,
    fresh_directory,
    is_full,
    no_space,
    read_json,
    remove_leftovers,
    step_path,
    steps_in,
    verify_directory,
)
from sftmix.disk.regular import regular
from sftmix.model.head import adapter_config
from sftmix.ranks.world import World
from sftmix.training.optimizer_state import restored, state_of
from sftmix.training.parallel import unwrap
from sftmix.training.part import part_of
from sftmix.words.errors import CheckpointError, ConfigError, NonFiniteError, NoSpaceError, SFTMixError

_NUMBERS = "optimizer.json"
_ARRAYS = "arrays.st"
"""Named unlike *.safetensors, because torch's reader takes every such file for a part of the sharded tensors."""
_MARGIN = 1.2
"""Bytes for each byte of an estimate: a checkpoint holds more than weights and the state of the optimizer."""


@dataclass
class CheckpointStore:
    """The checkpoints of one stage: `directory`/step-<8 digits>/.

    beside   what the stage has written so far, as patterns: a checkpoint is valid if it is still there, as it was
    seconds  what the last save took, from its beginning until the file of rank 0 was written
    second   a teacher's weights by name, which are saved and loaded beside the trained ones
    """

    directory: Path
    keep: int
    world: World
    beside: Sequence[str] = ()
    seconds: float = 0.0
    second: Mapping[str, torch.Tensor] = field(default_factory=dict)
    _verified: int | None = None
    """The step that was read in full and compared with its hashes by this object, by all ranks together."""
    _under_way: tuple[Future[Any], Callable[[list[Any]], None]] | None = None
    """What the thread of this rank returns, the entry of its file, and what makes the files of all a checkpoint."""
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), repr=False)

    @property
    def in_background(self) -> bool:
        """True if the training goes on while a save is written: not on a CPU, whose memory would hold it twice."""
        return self.world.device.type != "cpu"

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
        """Write the checkpoint of `step` from all ranks, after the save before it: in a thread, or at once.

        optimizer  None: the weights alone, to export and not to resume from
        state      the state of the loop except tensors, as JSON
        arrays     more tensors, the same on every rank
        Raises as `finish` does, and NonFiniteError if a weight is not finite; earlier checkpoints are untouched.
        """
        self.finish()
        started, module, path = time.perf_counter(), unwrap(wrapped), self.path(step)
        self._refuse_not_finite(module, step)  # before a good checkpoint could be pruned for it
        tensors, others = tensors_of(module, optimizer, self.second)
        needed = sum(t.numel() * t.element_size() for t in tensors.values())

        staging, beside = self.world.from_main(lambda: self._begin(step, needed))  # hashes of the log now: it grows
        with self._explained(step, needed):
            # On the host, as they are now: they change in the steps that are made while the thread writes.
            part = part_of(tensors, staging, copied=self.in_background, alone=self.world.size == 1)
            numbers, of_loop = (json.dumps(value, indent=1) for value in (others, {**state, "step": step}))

        def write() -> dict[str, Any]:
            files = part.write()
            self.seconds = time.perf_counter() - started
            return files

        def commit(of_ranks: list[Any]) -> None:
            with self._explained(step, needed):
                for problem in of_ranks:
                    if isinstance(problem, Exception):
                        raise problem
                (staging / "state.json").write_text(of_loop)
                (staging / _NUMBERS).write_text(numbers)
                if arrays:
                    (staging / _ARRAYS).write_bytes(save(dict(arrays)))
                about = {"step": step, "world_size": self.world.size}
                commit_directory(staging, path, about=about, known={**beside, **ChainMap(*of_ranks)})
                self._verified = None
                self._prune(step)  # after it, so that one valid checkpoint is always there

        self._under_way = self._thread.submit(write), commit
        if not self.in_background:
            self.finish()

    def _begin(self, step: int, needed: int) -> tuple[Path, dict[str, Any]]:
        """Return an empty directory, and the manifest's entries of what the stage has written beside it so far."""
        stage = self.directory.parent
        with self._explained(step, needed):
            files = [file for pattern in self.beside for file in sorted(stage.glob(pattern))]
            beside = {f"../../{file.relative_to(stage).as_posix()}": file_entry(file) for file in files}
            return fresh_directory(self.path(step)), beside

    def finish(self, *, wait: bool = True) -> None:
        """Make what all ranks have written a checkpoint, which readers then see, and keep the newest `keep`.

        wait  False: do nothing if a thread of any rank still writes
        Raises NoSpaceError on every rank if the disk of any is full, CheckpointError if any cannot write for another
        reason; earlier checkpoints are untouched.
        """
        if self._under_way is None:
            return
        files, commit = self._under_way
        if wait or not self.world.max(not files.done()):  # a rank that is ahead does not go alone
            of_ranks = self.world.gather(files.exception() or files.result())  # raised by all, in `commit`
            self._under_way = None
            self.world.on_main(lambda: commit(of_ranks))

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Wait at the end of the block for the save under way, also after an error that ranks raise by agreement."""
        try:
            yield
        except BaseException as error:
            # `finish` gathers: ranks that do not have the error would never come.
            agreed = isinstance(error, NonFiniteError | NoSpaceError | CheckpointError) and error.everywhere
            if self.world.size == 1 or agreed:
                with suppress(SFTMixError):  # it would hide the error itself
                    self.finish()
            raise
        self.finish()

    def _refuse_not_finite(self, module: nn.Module, step: int) -> None:
        """Raise NonFiniteError on every rank if a trained weight of any is not finite."""
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in trained_of(module).values()]
        if self.world.max(any(not torch.isfinite(p).all() for p in shards)):
            raise NonFiniteError(
                f"weights are not finite after step {step}, so {self.path(step)} is not written; lower "
                "training.learning_rate (the last checkpoint is untouched)"
            )

    def _prune(self, step: int) -> None:
        """Remove all but `keep` checkpoints: first the ones of later steps, which were passed over as damaged."""
        # step 6 and keep 2: of 8, 4, 2 stays 4
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
        each = sum(p.numel() * (p.element_size() + state_bytes) for p in trained_of(module).values())
        each += sum(weight.nbytes for weight in self.second.values())
        return int(_MARGIN * each) * min(saves, max(1, self.keep + 1 - len(self.steps())))

    def newest_valid(self) -> int | None:
        """Return the newest step that verifies; None if there are no checkpoints. All ranks call it.

        Each rank hashes its part of the files; all agree on a step before any of them loads it.

        Raises CheckpointError if there are checkpoints, but all are damaged: never a silent fresh start.
        """
        world, within = self.world, self.directory.parent
        steps: list[int] = world.from_main(self.steps)

        def problem_of(step: int) -> str | ConfigError | None:
            try:
                return verify_directory(self.path(step), within=within, part=(world.rank, world.size))
            except ConfigError as error:  # a link, in the part of one rank
                return error

        for step in steps:
            problem = next(filter(None, world.gather(problem_of(step))), None)
            if problem is None:
                self._verified = step
                return step
            if isinstance(problem, ConfigError):
                raise problem
            if world.is_main:
                warnings.warn(f"skipping checkpoint {self.path(step)}: {problem}", stacklevel=2)
        if steps:
            raise CheckpointError(f"no checkpoint in {self.directory} is readable; move them away to start again")
        return None

    def state(self, step: int, **needs: type) -> dict[str, Any]:
        """Return the loop's state in `step`, as it was saved; `needs` and errors as of `read_json`."""
        return read_json(self.path(step) / "state.json", **needs)

    def arrays(self, step: int) -> dict[str, torch.Tensor]:
        """Return the loop's tensors in `step`; none if none were saved."""
        file = self.path(step) / _ARRAYS
        return load_file(regular(file)) if file.exists() else {}

    def load(self, step: int, wrapped: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Load `step` in place, at any world size; the weights only without an optimizer."""
        module, path = unwrap(wrapped), self.path(step)
        # Files may be gone since they were hashed, if a run saves beside an export.
        stage, known = path.parents[1], step == self._verified
        if problem := self.world.from_main(lambda: verify_directory(path, hashes=not known, within=stage)):
            raise CheckpointError(f"{path}: {problem}")
        (tensors, _), reader = tensors_of(module, None, self.second), dcp.HuggingFaceStorageReader(str(path))
        if optimizer is not None:
            state = restored(
                trained_of(module),
                optimizer,
                _of(reader.read_metadata().state_dict_metadata, "optimizer/"),
                path / _NUMBERS,
            )
            tensors |= {f"optimizer/{name}": x for name, x in state.items()}
        try:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        except dcp.CheckpointException as failed:  # no Exception; a tensor is of another model, or a file is gone
            error = next(iter(failed.failures.values()))[0]
            raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from failed
        # Not strict: a tied weight is there by one of its names, and frozen ones are not.
        set_model_state_dict(module, _of(tensors, "weights/"), options=StateDictOptions(strict=False))


def own_weights(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the wrapped causal language model itself, to change in place; FSDP has its shards.

    These are all weights, tied ones under each of their names; with adapters, only those that are not frozen.
    """
    module = unwrap(wrapped)
    adapted = adapter_config(module.model) is not None
    state: dict[str, Any] = get_model_state_dict(module, options=StateDictOptions(ignore_frozen_params=adapted))
    names = trained_of(module) if adapted else state.keys()
    return {name.removeprefix("model."): state[name] for name in names if name in state}


def whole_weights(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of each weight; of shards the whole, so that every rank goes through them."""
    for name, x in weights.items():
        yield name, x.full_tensor() if isinstance(x, DTensor) else x


def full_weights(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """Gather `own_weights` on the CPU of rank 0; call it on every rank, of which the others get nothing."""
    is_main = not (dist.is_initialized() and dist.get_rank())
    return {name: x.cpu() for name, x in whole_weights(own_weights(wrapped)) if is_main}


def trained_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained weights of a module by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def tensors_of(module: nn.Module, optimizer: Any, second: Mapping[str, Any] = {}) -> tuple[dict[str, Any], Any]:
    """Return model and optimizer tensors by name, each storage once (a tied head is the embedding).

    The second part of the result is what JSON holds of the optimizer.
    """
    unique = set(trained_of(module))
    if all(p.requires_grad for p in module.parameters()):  # of a frozen base the buffers are its own
        unique |= {name for name, _ in module.named_buffers()}
    # First the weights: torch reshards what a forward has left gathered, which the optimizer does not know.
    tensors = {f"weights/{k}": v for k, v in get_model_state_dict(module).items() if k in unique}
    state, others = ({}, {}) if optimizer is None else state_of(trained_of(module), optimizer)
    return {**tensors, **second} | {f"optimizer/{name}": x for name, x in state.items()}, others


def _of(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
