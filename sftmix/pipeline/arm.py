"""The training of an arm, the target or its NTP baseline; its model is measured and exported."""

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from sftmix.config.wants import Wants
from sftmix.disk.files import check_room, read_steps
from sftmix.measure.delivered import deliver
from sftmix.measure.model import best_evaluation, measure, mixed_share
from sftmix.measure.summary import made_by
from sftmix.model.rounding import refuse_overflow
from sftmix.pipeline.arm_order import losses_of, order_of_arm
from sftmix.pipeline.context import Made, RunContext
from sftmix.pipeline.inputs import config_of_arm
from sftmix.pipeline.loaded import export_dtype, export_weights, round_weights
from sftmix.training.asked import evaluate
from sftmix.training.step import Stage
from sftmix.types import Rows, Scores, Split


def make_arm(run: RunContext, name: str, scores: Scores, split: Split | None, chosen: Rows | None = None) -> Made:
    """Train the target, or the NTP baseline in the same order, and measure and export it, rounded as it is exported.

    name           train or baseline
    scores, split  from the stages before; a single run takes neither, but makes a split for each epoch
    chosen         the rows that a selector has chosen by their scores; None: all
    """
    config = config_of_arm(run.config, name)
    rows = run.rows
    directory = run.path / name
    order, split_of = order_of_arm(run, name, scores, split, chosen)
    stage = run.training_stage(name, config, rows.encoder, data=rows.data.train, order=order, packed=rows.packed)
    stage.split_of = split_of
    if name == "train" and Wants(run.config).single_run:
        stage.online = losses_of(run)
    stage.eval_data = rows.data.eval
    dtype = export_dtype(config.model)
    refuse_overflow(stage.model, dtype)  # before the training: 1e5 has no room in float16
    if not config.checkpoint.every:  # an export that finds no room would leave nothing of the training
        size = dtype.itemsize * sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
        run.world.on_main(lambda: check_room(directory, size))
    result = run.train(stage)
    run.directory.tell(doing="measuring the trained model")
    began, steps, module = time.perf_counter(), int(result.figures["steps"]), result.module
    lines = run.world.from_main(lambda: read_steps(directory))
    as_trained = _nll_as_trained(stage, module, lines) if dtype.itemsize < 4 else None
    round_weights(config, module, dtype)  # first: what is measured next is of the weights that are delivered
    found = deliver(stage, module, figures=result.figures, last=lines[-1] if lines else {})
    files, measured = measure(directory, rows.data, stage.scorer, module, step=steps, scores=found.scores)
    figures = {
        **result.figures,
        **found.figures,
        **measured,
        "mixed_token_share": mixed_share(stage.order.batch, lines, rows.data.train.n_targets),
        "eval_nll_as_trained": as_trained,
        **best_evaluation(lines, as_trained or measured.get("eval_nll")),  # not rounded: delivered as trained
        "calibration_seconds": time.perf_counter() - began,
        "made_by": made_by(run.world.size),
    }
    run.directory.tell(doing="writing the model")
    export_weights(config, rows.encoder, module, directory / "model", dtype, run.world)
    files += [*found.files, "model", "metrics.jsonl", *(["online"] if (directory / "online").exists() else [])]
    nll = f", held-out NLL {measured['eval_nll']:.4f} per token" if "eval_nll" in measured else ""
    return Made(files, figures, f"{name}: {steps} of {figures['total_steps']} steps{nll}")


def _nll_as_trained(stage: Stage, module: nn.Module, lines: Sequence[Any]) -> float | None:
    """Return the held-out NLL of the weights before they are rounded; None without held-out rows.

    lines  of metrics.jsonl
    """
    if stage.eval_data is None:
        return None
    logged = lines[-1].get("eval_nll") if lines else None  # of the same weights, by the same scorer
    return evaluate(stage, module)["eval_nll"] if logged is None else logged
