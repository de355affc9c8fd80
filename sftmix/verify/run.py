"""The verification of a run, from its files to its weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sftmix.common.checkpoints import CHECKPOINTS
from sftmix.common.errors import Stopped
from sftmix.common.files import read_json
from sftmix.common.world import World, start_world
from sftmix.pipeline.write import write_model
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.machine import machine_of
from sftmix.verify.certificate import Certificate, Finding
from sftmix.verify.files import check_files
from sftmix.verify.inputs import Inputs, config_of, stages_before
from sftmix.verify.replay import Replayed, beside, replay
from sftmix.verify.results import Comparison, check_steps, check_weights, tensors_in
from sftmix.verify.window import Window

_NOT_REPLAYED = Finding("losses", None, "what the replay would read differs already")


def verify(window: Window) -> Certificate:
    """Replay the window and compare what it gives with what the run wrote; notes and progress go to stderr.

    Where a file is missing or the inputs differ there is nothing to replay, and the certificate says so. Started by
    torchrun, every rank calls it and returns the same. Raises ConfigError where this machine cannot compute as the
    run did, and the errors of rows that cannot be read.
    """
    config = config_of(window)
    with start_world(config.training.timeout) as world, contextlib.redirect_stdout(sys.stderr):
        recorded, stages = _recorded(window), stages_before(config, window)
        findings = world.share(world.on_main(lambda: check_files(window, stages)))
        if any(finding.blocks for finding in findings):
            return Certificate(window, [*findings, _NOT_REPLAYED])
        inputs = Inputs(window, config, world)
        findings += inputs.findings(stages)
        if any(finding.blocks for finding in findings):
            return Certificate(window, [*findings, _NOT_REPLAYED])
        with _threads(recorded), beside(world) as place:
            try:
                replayed = replay(window, inputs, world, place)
            except Stopped as error:
                raise Stopped("stopped by a signal; nothing was written into the run") from error
            own = machine_of(world, replayed.stage.options)
            rule = Comparison(exact=recorded == own)
            findings += world.share(world.on_main(lambda: check_steps(window, replayed.logged, rule)))
            findings += world.share(_check_ends(window, inputs, world, rule, replayed, place))
        return Certificate(window, findings, {"run": recorded, "replay": own})


def _recorded(window: Window) -> Mapping[str, Any]:
    """Return the machine that the run recorded, at the end of the window if it did there; empty if it did nowhere."""
    at_end = [step for step in (window.end, window.start) if step in window.kept]
    files = [window.checkpoint(step) / "state.json" for step in at_end]
    places = [*files[: int(window.end in at_end)], window.place / "figures.json", *files]
    found = (read_json(file).get("machine") for file in places if file.exists())
    return next((machine for machine in found if machine), {})


@contextlib.contextmanager
def _threads(recorded: Mapping[str, Any]) -> Iterator[None]:
    """Compute with as many threads as the run did: sums of another number of parts are rounded differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(recorded.get("threads", before)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_ends(
    window: Window, inputs: Inputs, world: World, rule: Comparison, replayed: Replayed, place: Path
) -> list[Finding]:
    """Compare the weights after the window, and the model of a finished stage; call it on every rank, rank 0 counts."""
    store = CheckpointStore(window.place / CHECKPOINTS, keep=1, world=world)

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in full_weights(replayed.module).items()}

    def against_model(kind: str, rule: Comparison) -> list[Finding]:
        found = weights()

        def compared() -> list[Finding]:
            base, dtype = inputs.config.model.path, inputs.config.model.dtype
            made = place / "exported"
            write_model(replayed.stage.model, found, made, base=base, dtype=dtype, encoder=inputs.rows.encoder)
            model = window.place / "model"
            return check_weights(kind, tensors_in(model), tensors_in(made), f"{window.stage}/model", rule)

        return world.on_main(compared) or []

    exports = window.finished and (window.place / "model").is_dir()
    if window.end in window.kept:
        mine = weights()
        store.load(window.end, replayed.module, None)
        where = f"{CHECKPOINTS}/{window.checkpoint(window.end).name}"
        findings = check_weights("weights", weights(), mine, where, rule)
    elif exports and window.end == window.last:
        return against_model("weights", rule)
    else:
        findings = [Finding("weights", None, _no_weights(window))]
    if exports and window.last in window.kept:
        store.load(window.last, replayed.module, None)
        findings += against_model("model", Comparison(exact=True))
    return findings


def _no_weights(window: Window) -> str:
    later = [step for step in (*window.kept, *([window.last] if window.finished else [])) if step > window.end]
    if not later:
        return f"the run kept none of step {window.end} or later, so the losses stand alone"
    steps = later[0] - window.start
    return f"the run kept none of step {window.end}; --steps {steps} goes to those of step {later[0]}"
