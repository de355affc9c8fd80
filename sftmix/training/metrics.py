"""Metrics of a running stage: metrics.jsonl, and sums of its steps."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftmix.batches.order import digest
from sftmix.components.contracts import OF_EXAMPLES, OF_LOSSES
from sftmix.disk.files import naming_full_disk, read_steps, write_text
from sftmix.ranks.world import World
from sftmix.training.step import Stage, StepResult
from sftmix.words.errors import ConfigError


class MetricsLog:
    """metrics.jsonl, which rank 0 writes: one line per optimizer step, from the step a run resumes from.

    All ranks make it. Raises NoSpaceError on every rank if the disk of rank 0 is full.

    last  the metrics of step `resume_step`, as they were returned by it; empty before the first step
    """

    def __init__(self, path: Path, *, resume_step: int, world: World) -> None:
        self.last: dict[str, float] = {}
        self._rows: str | None = None  # the hash of that step's

        def opened():
            """Return the file, opened to go on after `resume_step`: lines of later steps and torn ones are gone."""
            # Of a stage that begins anew, whatever is there is not read.
            lines = [line for line in read_steps(path.parent) if line["step"] <= resume_step] if resume_step else []
            if lines:
                # A number that was not finite is null in the log; rows are a hash, and no metric.
                self.last = {k: math.nan if v is None else v for k, v in lines[-1].items() if k != "rows"}
                self._rows = lines[-1].get("rows")
            # In one step: a kill leaves the log as it was, or this one.
            write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
            return path.open("a", encoding="utf-8")

        self._file = world.on_main(opened)
        self.last, self._rows = world.share((self.last, self._rows))

    def check_order(self, stage: Stage) -> None:
        """Raise ConfigError if step `resume_step` had other rows, by their hash, than it would have now."""
        step = int(self.last.get("step", 0))
        if self._rows is not None and self._rows != digest(stage.order.batch(step - 1)):
            raise ConfigError(
                f"{stage.name}: step {step} had other examples (`rows` in metrics.jsonl) than it would have "
                "now: another version of SFTMix, or of a component, orders them in another way. Go on with the version "
                "that began the run, or use another --out"
            )

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
        counts = done.counts
        if counts.mixup:
            self.ntp_count += counts.ntp
            self.mixup_count += counts.mixup
            if counts.mixup_mean == "own":
                self.mu_own += counts.mu * counts.mixup
                effective = counts.mu * counts.ntp / counts.mixup  # mu 0.2 of 300 NTP tokens, 100 pairs: 0.6
            else:
                self.mu_ntp += counts.mu * counts.mixup
                effective = counts.mu if counts.ntp else 0.0  # what is divided by nothing trains nothing
        return {
            **{name: getattr(done, name) for name in (*OF_LOSSES, *OF_EXAMPLES) if hasattr(done, name)},
            "mu_effective": effective,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "tokens_total": int(self.tokens),
            "examples_total": int(self.examples),
        }

    def figures(self) -> dict[str, float]:
        """Return all totals, and one mu_effective of all steps that mixed, with the mean of mu over the mixed pairs."""
        mixed = self.mixup_count or 1.0  # nothing was mixed: all that follows is 0
        return {**asdict(self), "mu_effective": (self.mu_own / mixed * self.ntp_count + self.mu_ntp) / mixed}


def figures_shown(metrics: Mapping[str, float]) -> str:
    """Return what the progress shows of a step: NTP and Mixup apart if pairs were mixed, else the loss; tokens/s.

    SFTMix minimises NTP + mu Mixup: beside the loss of NTP alone, its loss would look worse for counting more.
    """
    names = ("ntp", "mixup") if metrics["mixup_tokens"] else ("loss",)
    losses = [f"{name} {metrics[name]:.4f}" for name in names]
    return ", ".join([*losses, f"{metrics['tokens_per_second']:,.0f} tokens/s"])
