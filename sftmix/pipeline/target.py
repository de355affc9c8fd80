"""The stages that train and measure: the target, its NTP baseline, and the base model of both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from sftmix.data import EncodedDataset, Encoder
from sftmix.measure.model import measure, measure_trained
from sftmix.measure.summary import made_by
from sftmix.model.adapters import described_adapters
from sftmix.model.load import refuse_quantized
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.pipeline.context import Made, RunContext
from sftmix.pipeline.identity import arm_of
from sftmix.pipeline.models import export_weights, load_for_run, scorer, scoring_model
from sftmix.pipeline.pairs import order_of_arm
from sftmix.pipeline.rows import any_packed
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import Stage as TrainingStage
from sftmix.types import Scores, Split


def train_arm(run: RunContext, name: str, scores: Scores, split: Split | None) -> None:
    """Train the target, or the NTP baseline in the same order; then measure and export it.

    name           train or baseline
    scores, split  of the stages before; a single run has neither, and divides its epochs itself
    """
    config, world, rows, directory = run.config, run.world, run.rows, run.directory.path / name

    def make() -> Made:
        objective, perturbation = arm_of(config, name)
        stage = training_stage(
            run,
            name,
            config.model.path,
            rows.encoder,
            rows.data.train,
            config.training,
            config.model.lora,
            eval_data=rows.data.eval,
            eval_groups=rows.eval_groups,
            seed=config.seed,
            objective=objective,
            perturbation=perturbation,
            callbacks=config.callbacks,
            **order_of_arm(run, name, scores, split),
        )
        result = run.train(stage)
        run.directory.tell(doing="measuring the trained model")
        steps = int(result.figures["steps"])
        files, measured = measure_trained(world, rows.data, stage, result.module, groups=rows.eval_groups, steps=steps)
        run.directory.tell(doing="writing the model")
        weights = full_weights(result.module)
        world.on_main(lambda: export_weights(config, rows.encoder, stage.model, weights, directory / "model"))
        figures = {**result.figures, **measured, "made_by": made_by(world.size)}
        files = ["model", "metrics.jsonl", *files, *(["online"] if (directory / "online").exists() else [])]
        nll = f", held-out NLL {figures['eval_nll']:.4f} per token" if "eval_nll" in figures else ""
        early = f", stopped by {figures['stopped_by']}" if figures["stopped_by"] else ""
        return Made(files, figures, f"{name}: {steps} of {figures['total_steps']} steps{early}{nll}")

    run.enter(name, make, lambda: None)


def training_stage(
    run: RunContext,
    name: str,
    path: str,
    encoder: Encoder,
    data: EncodedDataset,
    options: TrainingOptions,
    lora: LoraOptions,
    *,
    seed: int,
    eval_data: EncodedDataset | None = None,
    token_nll: bool = False,
    **more: Any,
) -> TrainingStage:
    """Return a training stage of this run, with its model loaded and checked.

    path  of the model
    more  other fields of `sftmix.training.loop.Stage`
    """
    refuse_quantized(path)
    model, values = load_for_run(run.config, run.world, path, encoder, options, lora, seed=seed)
    if lora.r:
        run.say(f"{name}: {described_adapters(model)}")
    checkpoint = run.config.checkpoint
    return TrainingStage(
        name=name,
        model=model,
        values=values,
        data=data,
        eval_data=eval_data,
        optimizer=run.config.optimizer,
        options=options,
        checkpoint=checkpoint if name == "train" else replace(checkpoint, keep_best=False),
        directory=run.directory.path / name,
        identity=run.directory.identity(name),
        seed=seed,
        pad_id=encoder.pad_id,
        packed=any_packed(data, eval_data),
        scorer=scorer(options, run.world, encoder, name=name, token_nll=token_nll),
        on_progress=lambda step, total: run.directory.status(step=step, total_steps=total, throttle=1.0),
        **more,
    )


def measure_base(run: RunContext) -> None:
    """Measure the untrained model, once for all arms; it comes after them, so that no step waits for it."""

    def make() -> Made:
        config, world, rows, data = run.config, run.world, run.rows, run.rows.data
        lora, packed = config.model.lora.without_adapters(), any_packed(data.train, data.eval)
        path = config.model.path
        score, module = scoring_model(config, world, path, rows.encoder, name="base", packed=packed, lora=lora)
        directory = run.directory.path / "base"
        return Made(*measure(directory, world, data, partial(score, module), groups=rows.eval_groups))

    run.enter("base", make, lambda: None)
