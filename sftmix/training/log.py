"""The reports of a running stage: metrics.jsonl, sums of its steps, memory, machines; and the signals that stop it."""

import contextlib
import json
import math
import platform
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers

import sftmix
from sftmix.common.errors import Stopped
from sftmix.common.files import naming_full_disk, read_steps, write_text
from sftmix.common.launcher import another_rank_failed
from sftmix.common.world import World
from sftmix.options import LAYOUT, TrainingOptions
from sftmix.training.step import StepResult


class MetricsLog:
    """metrics.jsonl, which rank 0 writes: one line per optimizer step, from the step a run resumes from.

    All ranks make it. Raises NoSpaceError on every rank if the disk of rank 0 is full.

    last  the metrics of step `resume_step`, as they were returned by it; empty before the first step
    """

    def __init__(self, path: Path, *, resume_step: int, world: World) -> None:
        self.last: dict[str, float] = {}

        def opened():
            """Return the file, opened to go on after `resume_step`: lines of later steps and torn ones are gone."""
            lines = [line for line in read_steps(path.parent) if line["step"] <= resume_step]
            if lines:
                self.last = {k: math.nan if v is None else v for k, v in lines[-1].items() if k != "rows"}
            write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
            return path.open("a", encoding="utf-8")

        self._file = world.on_main(opened)
        self.last = world.share(self.last)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write the line of a step: its metrics, and the hash of its rows; a number that is not finite becomes null."""
        if self._file is not None:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
            with naming_full_disk(Path(self._file.name)):
                self._file.write(f"{json.dumps(finite)}\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # each line was flushed: on a full disk only what failed is still held
                self._file.close()


@dataclass
class Totals:
    """Sums over the steps of a stage so far; a checkpoint keeps them.

    elapsed                  seconds in steps
    tokens                   of all examples, prompts included
    examples                 slots of all global batches; an example counts each time it has one
    ntp_tokens, mixup_tokens as in metrics.jsonl
    ntp_count, mixup_count   denominators of the steps that mixed
    mu_own, mu_ntp           mu times mixup_count, over the steps with mixup_mean own or ntp (mu may follow a schedule)
    skipped                  steps with a gradient that was not finite
    updates                  steps that moved the weights: not those skipped, nor those that counted nothing
    """

    elapsed: float = 0.0
    tokens: float = 0.0
    examples: float = 0.0
    ntp_tokens: float = 0.0
    mixup_tokens: float = 0.0
    ntp_count: float = 0.0
    mixup_count: float = 0.0
    mu_own: float = 0.0
    mu_ntp: float = 0.0
    skipped: float = 0.0
    updates: float = 0.0

    def add(self, done: StepResult, *, tokens: int, examples: int, seconds: float) -> dict[str, float]:
        """Add a step; return what the log says of it by itself, to which the callbacks add.

        mu_effective is mu N_ntp / N_mix, the mu that gives the same loss if both terms are divided by the NTP count.
        """
        self.elapsed += seconds
        self.tokens += tokens
        self.examples += examples
        self.ntp_tokens += done.ntp_tokens
        self.mixup_tokens += done.mixup_tokens
        self.skipped += done.skipped
        self.updates += done.updates
        effective = 0.0
        if done.mixup_count:
            self.ntp_count += done.ntp_count
            self.mixup_count += done.mixup_count
            if done.mixup_mean == "own":
                self.mu_own += done.mu * done.mixup_count
                effective = done.mu * done.ntp_count / done.mixup_count
            else:
                self.mu_ntp += done.mu * done.mixup_count
                effective = done.mu
        logged = ("loss", "ntp", "mixup", "learning_rate", "grad_norm", "ntp_tokens", "mixup_tokens")
        return {
            **{name: getattr(done, name) for name in logged},
            "mu_effective": effective,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "tokens_total": int(self.tokens),
            "examples_total": int(self.examples),
        }

    def figures(self) -> dict[str, float]:
        """Return all totals, and one mu_effective of all steps that mixed, with the mean of mu over the mixed pairs."""
        effective, mixed = 0.0, self.mixup_count
        if mixed:
            effective = self.mu_own / mixed * self.ntp_count / mixed + self.mu_ntp / mixed
        return {**asdict(self), "mu_effective": effective}


def figures_shown(metrics: Mapping[str, float]) -> str:
    """Return what the progress shows of a step: NTP and Mixup apart where pairs were mixed, else the loss; tokens/s.

    SFTMix minimises NTP + mu Mixup: its loss beside that of NTP alone would look worse for counting more.
    """
    names = ("ntp", "mixup") if metrics["mixup_tokens"] else ("loss",)
    losses = [f"{name} {metrics[name]:.4f}" for name in names]
    return ", ".join([*losses, f"{metrics['tokens_per_second']:,.0f} tokens/s"])


class StopSignal:
    """A handler that remembers SIGTERM or SIGUSR1, so that the loop can save at the next step boundary.

    Where another rank has failed before, no step boundary will come that all ranks reach: it raises Stopped at once.

    received     True once one has arrived, also if another handler around this one received it and nothing came of it
    interrupted  True once Ctrl-C was pressed: a destructor or a callback of C code may swallow the KeyboardInterrupt
    """

    def __init__(self) -> None:
        self.received = self.interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # in other threads the caller handles signals
            for number in {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}:  # Windows has one of them
                self._previous[number] = signal.signal(number, self._arrived)
            if callable(signal.getsignal(signal.SIGINT)):  # neither ignored nor at the system's default
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
        around = (getattr(handler, "__self__", None) for handler in self._previous.values())
        self.received |= any(getattr(one, "received", False) for one in around)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _interrupted(self, number: int, frame: Any) -> None:
        self.interrupted = True
        running = frame
        while running is not None:
            if running.f_code.co_name == "__del__":  # Python would print what it raises, and go on
                return
            running = running.f_back
        self._previous[number](number, frame)

    def _arrived(self, *_: object) -> None:
        self.received = True
        if another_rank_failed():
            raise Stopped("another rank failed; the same command continues from the last checkpoint")


class StopAtOnce(StopSignal):
    """A handler for work outside the loop, with nothing to save: either signal raises Stopped at once.

    The work may swallow it: a bare `except:`, a callback of C code, a destructor. So it is raised again by `check`, and
    in place of an error that ends the work after the signal.
    """

    def __exit__(self, *error: Any) -> None:
        super().__exit__()
        if self.received and isinstance(error[1], Exception):
            raise Stopped(_STOPPED) from error[1]

    def check(self, world: World) -> None:
        """Raise Stopped on every rank if any rank has received a signal. Call it on every rank."""
        if world.max(float(self.received)):
            raise Stopped(_STOPPED)

    def _arrived(self, *_: object) -> None:
        self.received = True
        raise Stopped(_STOPPED)


_STOPPED = "stopped by a signal; what was finished is kept, the same command continues"


class PeakMemory:
    """Peak bytes since construction: of the GPU's allocator, or resident memory of this process on CPU.

    Memory resident at construction counts, and so do mapped files that were read. Use one at a time: a new one restarts
    the count. If the system cannot restart it (not Linux), the peak counts from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        peak = status.read_text().partition("VmHWM:")[2] if status.exists() else ""
        if peak:
            return int(peak.split()[0]) * 1024
        if sys.platform == "win32":
            return 0  # not known
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------------- machines

Machine = dict[str, Any]
"""What decides how sums are rounded: where it is equal, the same steps give the same bits.

A stage may be made on several machines, one after the other. Its record is a list in the order of the steps, and each
entry has `after`, the step after which that machine went on.
"""


def machine_of(world: World, options: TrainingOptions) -> Machine:
    """Return versions, the device of rank 0, threads and ranks, and the options of LAYOUT.

    cuda  the version of CUDA or ROCm, or the kind of another GPU; None if the device is a CPU
    """
    device, gpu, info = world.device, world.device.type != "cpu", Path("/proc/cpuinfo")
    # Libraries choose by the model of the CPU how they multiply matrices.
    named = re.search(r"^model name.*?:(.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    model = named[1].strip() if named else platform.processor() or platform.machine()
    cpu = f"cpu {model} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "sftmix": sftmix.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cuda": (torch.version.cuda or torch.version.hip or device.type) if gpu else None,
        "device": torch.get_device_module(device).get_device_name(device) if gpu else cpu,
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        **{name: getattr(options, name) for name in LAYOUT},
    }


def going_on(recorded: Sequence[Machine], step: int, machine: Machine) -> list[Machine]:
    """Return the record of a stage that goes on after `step` on this machine."""
    if recorded and {**recorded[-1], **machine} == recorded[-1]:
        return [*recorded]
    return [*recorded, {"after": step, **machine}]


def machines_between(recorded: Sequence[Machine], start: int, end: int) -> list[Machine]:
    """Return the machines, without `after`, of the steps after `start` up to `end`; none if one is unknown."""
    ends = [*(one["after"] for one in recorded[1:]), math.inf]
    inside = [one for one, upto in zip(recorded, ends, strict=False) if one["after"] < end and upto > start]
    if not inside or inside[0]["after"] > start:
        return []
    return [{name: one[name] for name in one if name != "after"} for one in inside]


def same_bits(recorded: Sequence[Machine], machine: Machine) -> bool:
    """Return True if steps of the recorded machines give the same bits on this one.

    On a GPU they may not even on the same machine: some of its kernels add in another order each time.
    """
    return bool(recorded) and all(one == machine for one in recorded) and machine["cuda"] is None
