"""The stages that train and measure: the target, its NTP baseline, and the base model of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sftmix.batches.order import TrainingOrder
from sftmix.common.figures import counted
from sftmix.components.base import Objective
from sftmix.data import EncodedDataset, Encoder
from sftmix.measure.model import Measurement
from sftmix.measure.summary import made_by
from sftmix.model.adapters import described_adapters
from sftmix.model.load import refuse_quantized
from sftmix.model.unused import described_unused
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.pipeline.context import Made, RunContext, Stage
from sftmix.pipeline.identity import arm_inputs, arm_of, base_inputs
from sftmix.pipeline.models import export_weights, load_for_run, scorer, scoring_model
from sftmix.pipeline.pairs import order_of_training, pairs_of_arm
from sftmix.pipeline.rows import RunRows, any_packed
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import Stage as TrainingStage
from sftmix.types import Scores, Split


def arm_stage(run: RunContext, rows: RunRows, name: str, scores: Scores, split: Split | None) -> Stage[None]:
    """The training of the target, or of the NTP baseline in the same order; then it is measured and exported.

    name           train or baseline
    scores, split  of the stages before; a single run has neither, and divides its epochs itself
    """
    config, world, directory = run.config, run.world, run.directory.path / name

    def make() -> Made:
        pairs, online = pairs_of_arm(run, rows, name, scores, split)
        objective, perturbation = arm_of(config, name)
        stage = training_stage(
            run,
            name,
            rows.encoder,
            rows.data.train,
            rows.data.eval,
            model_path=config.model.path,
            lora=config.model.lora,
            options=config.training,
            seed=config.seed,
            objective=objective,
            order=order_of_training(run, rows, pairs),
        )
        stage.perturbation, stage.callbacks = perturbation, config.callbacks
        stage.split_of, stage.online, stage.eval_groups = pairs.split_of, online, rows.eval_groups
        result = run.train(stage)
        run.directory.tell(doing="measuring the trained model")
        measurement = Measurement(directory, world, rows.data, rows.eval_groups)
        measured = measurement.trained(stage, result.module, steps=int(result.figures["steps"]))
        run.directory.tell(doing="writing the model")
        weights = full_weights(result.module)
        world.on_main(lambda: export_weights(config, rows.encoder, stage.model, weights, directory / "model"))
        figures = {**result.figures, **measured.figures, "made_by": made_by(world.size)}
        files = ["model", "metrics.jsonl", *measured.files, *(["online"] if (directory / "online").exists() else [])]
        return Made(files, figures, [_told(name, figures, run.seconds())])

    return Stage(name, lambda: arm_inputs(run.known(rows), name), make, lambda: None)


def _told(name: str, figures: Mapping[str, Any], seconds: float) -> str:
    held_out = f", held-out NLL {figures['eval_nll']:.4f} per token" if "eval_nll" in figures else ""
    early = f" of {figures['total_steps']}, stopped by {figures['stopped_by']}" if figures["stopped_by"] else ""
    return f"{name}: {counted(figures['steps'], 'step')}{early}{held_out} ({seconds:.0f} s)"


def training_stage(
    run: RunContext,
    name: str,
    encoder: Encoder,
    data: EncodedDataset,
    eval_data: EncodedDataset | None = None,
    *,
    model_path: str,
    lora: LoraOptions,
    options: TrainingOptions,
    seed: int,
    objective: Objective,
    order: TrainingOrder,
    token_nll: bool = False,
) -> TrainingStage:
    """Return a training stage of this run, with its model loaded and checked."""
    config, world = run.config, run.world
    refuse_quantized(model_path)
    model, values = load_for_run(config, world, model_path, encoder, options, lora, seed=seed)
    if lora.r:
        run.say(f"{name}: {described_adapters(model)}")
    elif left := described_unused(model):
        run.say(f"{name}: {left}")
    return TrainingStage(
        name=name,
        model=model,
        values=values,
        data=data,
        eval_data=eval_data,
        order=order,
        objective=objective,
        optimizer=config.optimizer,
        options=options,
        checkpoint=config.checkpoint if name == "train" else replace(config.checkpoint, keep_best=False),
        directory=run.directory.path / name,
        identity=run.directory.identity(name),
        seed=seed,
        pad_id=encoder.pad_id,
        packed=any_packed(data, eval_data),
        scorer=scorer(options, world, encoder, name=name, token_nll=token_nll),
        on_progress=lambda step, total: run.directory.status(step=step, total_steps=total, throttle=1.0),
    )


def base_stage(run: RunContext, rows: RunRows) -> Stage[None]:
    """The measurement of the untrained model, once for all arms; it comes after them, so that no step waits for it."""

    def make() -> Made:
        config, world, data = run.config, run.world, rows.data
        lora, packed = config.model.lora.without_adapters(), any_packed(data.train, data.eval)
        score = scoring_model(config, world, config.model.path, rows.encoder, name="base", packed=packed, lora=lora)
        measured = Measurement(run.directory.path / "base", world, data, rows.eval_groups).base(score)
        nll = measured.figures.get("eval_nll")
        held_out = "a sample scored" if nll is None else f"held-out NLL {nll:.4f} per token"
        return Made(measured.files, measured.figures, [f"base: {held_out} ({run.seconds():.0f} s)"])

    return Stage("base", lambda: base_inputs(run.known(rows)), make, lambda: None)
