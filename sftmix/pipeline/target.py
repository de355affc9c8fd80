"""The stages that train and measure: the target, its NTP baseline, and the base model of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from sftmix.batches.order import EpochPairs, TrainingOrder
from sftmix.common.checkpoints import BEST
from sftmix.common.errors import ConfigError
from sftmix.common.figures import counted
from sftmix.common.files import read_json
from sftmix.components.base import Objective
from sftmix.config.checks import refuse_sharded
from sftmix.data import EncodedDataset, Encoder
from sftmix.measure.model import Measurement
from sftmix.measure.summary import made_by
from sftmix.model.adapters import described_adapters
from sftmix.model.load import refuse_quantized
from sftmix.model.unused import described_unused
from sftmix.options import SHARDED, LoraOptions, TrainingOptions
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.identity import arm_inputs, arm_of, base_inputs
from sftmix.pipeline.models import load_for_run, scorer, scoring_model
from sftmix.pipeline.rows import RunRows, any_packed
from sftmix.pipeline.write import write_model
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import Stage, StageResult
from sftmix.training.online import OnlineLosses
from sftmix.training.parallel import resolve_parallel


def train_arm(
    run: RunContext,
    rows: RunRows,
    name: Literal["train", "baseline"],
    pairs: EpochPairs,
    *,
    online: OnlineLosses | None = None,
) -> None:
    """Train the target, or the NTP baseline in the same order, then measure and export it.

    online  keeper of the losses of a single run
    """
    if run.begin(name, arm_inputs(run.known(rows), name)):
        _say_if_too_late(run, name)
        return
    objective, perturbation = arm_of(run.config, name)
    config, world, directory = run.config, run.world, run.directory.path / name
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
    stage = replace(
        stage,
        perturbation=perturbation,
        callbacks=config.callbacks,
        split_of=pairs.split_of,
        online=online,
        eval_groups=rows.eval_groups,
    )
    result = run.train(stage)
    run.directory.tell(doing="measuring the trained model")
    measured = Measurement(directory, world, rows.data, rows.eval_groups).trained(
        stage, result.module, steps=int(result.figures["steps"])
    )
    run.directory.tell(doing="writing the model")
    _export(run, rows, stage, result, directory / "model")
    figures = {**result.figures, **measured.figures, "wall_seconds": run.seconds(), "made_by": made_by(world.size)}
    figures["best_kept"] = (directory / BEST).is_dir()
    kept = ["online"] if (directory / "online").exists() else []
    run.finish(name, ["model", "metrics.jsonl", *measured.files, *kept], figures)
    held_out = f", held-out NLL {figures['eval_nll']:.4f} per token" if "eval_nll" in figures else ""
    early = f" of {figures['total_steps']}, stopped by {figures['stopped_by']}" if figures["stopped_by"] else ""
    run.say(f"{name}: {counted(figures['steps'], 'step')}{early}{held_out} ({figures['wall_seconds']:.0f} s)")


def _say_if_too_late(run: RunContext, name: str) -> None:
    """Say that a finished arm cannot keep its best weights any more, where the configuration asks for them."""
    figures = read_json(run.directory.path / name / "figures.json")
    if name == "train" and run.config.checkpoint.keep_best and not figures.get("best_kept"):
        run.say("note: checkpoint.keep_best comes too late for this run, whose training is done; use another --out")


def order_of_training(run: RunContext, rows: RunRows, pairs: EpochPairs) -> TrainingOrder:
    """Return the global batches of the target's training, which its baseline shares."""
    config = run.config
    order = TrainingOrder(
        len(rows.data.train), pairs.pairs_of, options=config.training, seed=config.seed, known=pairs.known
    )
    if not pairs.known and len(order.ends) < 2:
        raise ConfigError(
            f"--reference {type(config.reference).__name__} needs a second epoch, which the losses of the "
            f"first decide, but training has {len(order.ends)}: raise training.epochs (or training.max_steps)"
        )
    return order


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
) -> Stage:
    """Return a training stage of this run, with its model loaded and checked."""
    config, world = run.config, run.world
    optimizer, parallel = config.optimizer, resolve_parallel(options.parallel, world)
    if parallel in SHARDED:
        refuse_sharded(optimizer, lora, f"training.parallel {options.parallel} (here {parallel})")
    refuse_quantized(model_path)
    model, values = load_for_run(config, world, model_path, encoder, options, lora, seed=seed)
    if lora.r:
        run.say(f"{name}: {described_adapters(model)}")
    elif left := described_unused(model):
        run.say(f"{name}: {left}")
    for option, most in (("global_batch_size", len(data)), ("micro_batch_size", options.global_batch_size)):
        if (size := getattr(options, option) or 0) > most:
            run.say(f"{name}: training.{option} is {size}, but no step has more than {most} different examples")
    return Stage(
        name=name,
        model=model,
        values=values,
        data=data,
        eval_data=eval_data,
        order=order,
        objective=objective,
        optimizer=optimizer,
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


def _export(run: RunContext, rows: RunRows, stage: Stage, result: StageResult, path: Path) -> None:
    weights = full_weights(result.module)
    base, dtype = run.config.model.path, run.config.model.dtype
    run.world.on_main(lambda: write_model(stage.model, weights, path, base=base, dtype=dtype, encoder=rows.encoder))


def measure_base(run: RunContext, rows: RunRows) -> None:
    """Measure the untrained model once for all arms. It comes after them, so that no first step waits for it."""
    config, world, data = run.config, run.world, rows.data
    lora = config.model.lora.without_adapters()
    if run.begin("base", base_inputs(run.known(rows))):
        return
    packed = any_packed(data.train, data.eval)
    score = scoring_model(config, world, config.model.path, rows.encoder, name="base", packed=packed, lora=lora)
    measured = Measurement(run.directory.path / "base", world, data, rows.eval_groups).base(score)
    figures = {**measured.figures, "wall_seconds": run.seconds()}
    run.finish("base", measured.files, figures)
    held_out = f"held-out NLL {figures['eval_nll']:.4f} per token" if "eval_nll" in figures else "a sample scored"
    run.say(f"base: {held_out} ({figures['wall_seconds']:.0f} s)")
