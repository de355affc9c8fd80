"""The verification of a run, from its files to its weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sftmix.common.errors import ConfigError, Stopped
from sftmix.common.files import read_json
from sftmix.common.world import World, start_world
from sftmix.tools.verify.certificate import Certificate, Finding
from sftmix.tools.verify.ends import check_ends
from sftmix.tools.verify.files import check_files
from sftmix.tools.verify.inputs import Inputs, config_of, stages_before
from sftmix.tools.verify.replay import beside, replay
from sftmix.tools.verify.split import check_groups
from sftmix.tools.verify.steps import Comparison, check_steps
from sftmix.tools.verify.window import Window
from sftmix.training.machine import machines_between

_NOT_REPLAYED = Finding("losses", None, "what the replay would read differs already")


def verify(window: Window) -> Certificate:
    """Replay the window and compare what it gives with what the run wrote; notes and progress go to stderr.

    Where a file is missing or the inputs differ there is nothing to replay, and the certificate says so. Started by
    torchrun, every rank calls it and returns the same; the window is that of rank 0, for a run that goes on may have
    saved since the others looked. Raises ConfigError where this machine cannot compute as the run did, and the errors
    of files and rows that cannot be read.
    """
    config = config_of(window)
    with start_world(config.training.timeout) as world, contextlib.redirect_stdout(sys.stderr):
        refuse_several_nodes(world)
        window = world.share(window)
        stages = world.share(stages_before(config, window))
        findings = world.share(world.on_main(lambda: check_files(window)))
        if any(finding.blocks for finding in findings):
            return Certificate(window, [*findings, _NOT_REPLAYED])
        inputs = Inputs(window, config, world)
        findings += inputs.findings(stages)
        if any(finding.blocks for finding in findings):
            return Certificate(window, [*findings, _NOT_REPLAYED])
        findings += world.share(world.on_main(lambda: check_groups(window.run, inputs, stages)))
        recorded = world.share(world.on_main(lambda: _recorded(window)))
        with _threads(recorded), beside(world) as place:
            try:
                replayed = replay(window, inputs, world, place, recorded)
            except Stopped as error:
                raise Stopped("stopped by a signal; nothing was written into the run") from error
            rule = Comparison(replayed.exact, inputs.precision(window.stage))
            findings += world.share(world.on_main(lambda: check_steps(window, replayed.logged, rule)))
            findings += world.share(check_ends(window, inputs, world, replayed, place))
        return Certificate(window, findings, recorded, replayed.machine)


def refuse_several_nodes(world: World) -> None:
    """Raise ConfigError on every rank if the ranks are not on one machine, whose temporary directory they share."""
    if world.size > world.local_size:
        raise ConfigError(
            f"verify has {world.size} ranks on several nodes, which share no temporary directory; start it on one node "
            f"with torchrun --nproc_per_node {world.size}, or with fewer ranks: then numbers are compared but for "
            "rounding"
        )


def _recorded(window: Window) -> Sequence[Mapping[str, Any]]:
    """Return the machines that made the steps of the window, as the run recorded them; none if it did not.

    A checkpoint at the end knows them all, and so do the figures of a finished stage and later checkpoints. Else the
    last machine that is known counts for the steps after it, too.
    """
    states = {step: window.checkpoint(step) / "state.json" for step in window.kept}
    later = [file for step, file in states.items() if step >= window.end]
    earlier = [file for step, file in states.items() if step < window.end]
    figures = [window.run / window.stage / "figures.json"] if window.finished else []
    known = [*later[: window.end in states], *figures, *later, *reversed(earlier)]
    return machines_between(read_json(known[0]).get("machines", []), window.start, window.end) if known else []


@contextlib.contextmanager
def _threads(recorded: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Compute with as many threads as the run did: sums of another number of parts are rounded differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(recorded[0]["threads"]) if recorded else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
