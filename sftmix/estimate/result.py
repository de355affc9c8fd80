"""What an estimate says of each stage and of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sftmix.estimate.layout import Layout
from sftmix.estimate.machine import Machine
from sftmix.estimate.memory import Memory
from sftmix.estimate.traffic import Traffic
from sftmix.estimate.work import Work


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage: what it does, FLOPs of training and of scoring on all devices, memory of one device.

    traffic       bytes that each device sends in one optimizer step
    reading_sent  and in all scoring together
    """

    work: Work
    layout: Layout
    numbers: int
    trained: int
    training_flops: float
    reading_flops: float
    traffic: Traffic
    reading_sent: float
    memory: Memory

    @property
    def flops(self) -> float:
        return self.training_flops + self.reading_flops

    @property
    def step_flops(self) -> float:
        """Of one optimizer step, on all devices."""
        return self.training_flops / max(self.work.steps, 1)

    def hours(self, machine: Machine) -> float | None:
        """Device-hours; None: the peak of the device is unknown."""
        training = machine.hours(self.training_flops, self.traffic.all * self.work.steps)
        reading = machine.hours(self.reading_flops, self.reading_sent)
        return None if training is None or reading is None else training + reading


@dataclass(frozen=True, slots=True)
class Remedy:
    """Options as on the command line, and the bytes on one device at the peak of a stage that they lead to."""

    options: str
    peak: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """All stages of a run on a machine.

    remedies  of each stage that does not fit, by name: what lowers its peak
    """

    machine: Machine
    stages: Sequence[StageEstimate]
    examples: int
    tokens: float
    remedies: Mapping[str, Sequence[Remedy]] = field(default_factory=dict)

    @property
    def hours(self) -> float | None:
        """Device-hours of the whole."""
        found = [stage.hours(self.machine) for stage in self.stages]
        return None if None in found else sum(hours for hours in found if hours is not None)

    @property
    def times_plain(self) -> float:
        """FLOPs of the whole in those of the target's training alone."""
        (target,) = (stage for stage in self.stages if stage.work.name == "train")
        return sum(stage.flops for stage in self.stages) / target.training_flops

    @property
    def too_large(self) -> list[StageEstimate]:
        """The stages that need more than a device has."""
        most = self.machine.memory
        return [] if most is None else [stage for stage in self.stages if stage.memory.peak > most]
