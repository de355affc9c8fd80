"""The weights after the window, and the exported model of a finished stage, compared with those of the replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sftmix.common.checkpoints import CHECKPOINTS
from sftmix.common.files import read_json
from sftmix.common.tables import read_table
from sftmix.common.world import World
from sftmix.measure.model import Measurement
from sftmix.pipeline.write import write_model
from sftmix.tools.verify.certificate import Finding, listed
from sftmix.tools.verify.inputs import Inputs
from sftmix.tools.verify.replay import Replayed, link
from sftmix.tools.verify.split import write_summary
from sftmix.tools.verify.weights import Tensors, check_weights, tensors_in
from sftmix.tools.verify.window import Window
from sftmix.training.checkpoint import CheckpointStore, full_weights


def check_ends(window: Window, inputs: Inputs, world: World, replayed: Replayed, place: Path) -> list[Finding]:
    """Compare the weights after the window, and the model of a finished stage; call it on every rank, rank 0 counts.

    place  directory to write models into
    """
    ends = _Ends(window, inputs, world, replayed, place)
    model = window.run / window.stage / "model"
    exports = window.finished and model.is_dir()
    if window.end in window.kept:
        findings = ends.against_checkpoint()
    elif exports and window.end == window.last:
        return [*ends.figures(), *ends.against_model("weights", model, ends.weights(), exact=replayed.exact)]
    else:
        findings = [Finding("weights", None, _no_weights(window))]
    if exports and window.last in window.kept:
        findings += ends.against_model("model", model, ends.stored(window.last), exact=True)
        findings += ends.figures()
    elif exports:
        start = max((step for step in window.kept if step < window.last), default=0)
        to = f"--from {start} --steps {window.last - start} compares it with weights made again"
        findings.append(Finding("model", None, f"{window.stage}/model: step {window.last} has no checkpoint; {to}"))
    return findings


class _Ends:
    """The trained module of a replay, and the run whose weights are loaded into it one after the other."""

    def __init__(self, window: Window, inputs: Inputs, world: World, replayed: Replayed, place: Path) -> None:
        self._window, self._inputs, self._world = window, inputs, world
        self._replayed, self._place = replayed, place
        self._store = CheckpointStore(window.place / CHECKPOINTS, keep=1, world=world)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are in the module now, on rank 0."""
        return {name: tensor.clone() for name, tensor in full_weights(self._replayed.module).items()}

    def stored(self, step: int) -> dict[str, torch.Tensor]:
        """Load a checkpoint into the module, and return its weights."""
        self._store.load(step, self._replayed.module, None)
        return self.weights()

    def against_checkpoint(self) -> list[Finding]:
        """Compare the weights of the replay with the checkpoint at the end of the window."""
        window, exact, found = self._window, self._replayed.exact, self.weights()
        expected, before = self.stored(window.end), self._before(exact=exact)
        where = f"{CHECKPOINTS}/{window.checkpoint(window.end).name}"
        return self._on_main(lambda: check_weights("weights", expected, found, where, exact=exact, before=before))

    def against_model(self, kind: str, model: Path, found: Tensors, *, exact: bool) -> list[Finding]:
        """Compare weights, as a run would export them, with the exported model."""
        before = self._before(exact=exact)

        def compared() -> list[Finding]:
            began = None if before is None else self._exported({name: before[name] for name in found}, "before")
            made, where = self._exported(found, "after"), f"{self._window.stage}/model"
            return check_weights(kind, tensors_in(model), made, where, exact=exact, before=began)

        return self._on_main(compared)

    def figures(self) -> list[Finding]:
        """Measure the final weights, which are in the module now, as the run did, and compare what it wrote of them."""
        window, rows, made, replayed = self._window, self._inputs.rows, self._place / "measured", self._replayed
        run, stage = window.run, window.stage
        recorded = read_json(run / stage / "figures.json", machines=list)
        if not (replayed.exact and replayed.machine.items() <= recorded["machines"][-1].items()):
            return [Finding("figures", None, "they were measured on another machine")]
        self._world.on_main(lambda: link(window.file("metrics.jsonl"), made / stage / "metrics.jsonl"))
        measurement = Measurement(made / stage, self._world, rows.data, rows.eval_groups)
        measured = measurement.trained(replayed.stage, replayed.module, steps=window.last)
        files = [f"{stage}/{name}" for name in measured.files]
        if (run / "base/figures.json").exists():  # the last stage, so that the summary tells of all
            write_summary(run, self._inputs, made)
            files.append("summary.json")
        figures = measured.figures.items()
        wrong = [name for name, value in figures if "seconds" not in name and recorded.get(name) != value]
        wrong += [name for name in files if _read(run / name) != _read(made / name)]
        return [Finding("figures", not wrong, listed(wrong or ["figures.json", *files]))]

    def _before(self, *, exact: bool) -> Tensors | None:
        """Return the weights before the window, which only another machine needs; None if nothing holds them."""
        if exact:
            return None
        return self.stored(self._window.start) if self._window.start else self._replayed.before

    def _exported(self, weights: Tensors, name: str) -> Mapping[str, torch.Tensor]:
        config, to = self._inputs.config, self._place / "exported" / name
        base, dtype, encoder = config.model.path, config.model.dtype, self._inputs.rows.encoder
        write_model(self._replayed.stage.model, weights, to, base=base, dtype=dtype, encoder=encoder)
        return tensors_in(to)

    def _on_main(self, work: Callable[[], list[Finding]]) -> list[Finding]:
        return self._world.on_main(work) or []


def _read(file: Path) -> Any:
    return read_json(file) if file.suffix == ".json" else read_table(file, ["id"])


def _no_weights(window: Window) -> str:
    later = [step for step in (*window.kept, *([window.last] if window.finished else [])) if step > window.end]
    if not later:
        return f"the run kept none of step {window.end} or later, so the losses stand alone"
    steps = later[0] - window.start
    return f"the run kept none of step {window.end}; --steps {steps} goes to those of step {later[0]}"
