"""The stages of the target, of its NTP baseline and of the base model of both; the pairs of each epoch."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sftmix.batches.order import TrainingOrder
from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import sha256_file
from sftmix.common.steps import read_steps
from sftmix.common.tables import write_dynamics
from sftmix.components.base import PairSampler
from sftmix.components.confidence import variability
from sftmix.components.contracts import check_confidence, check_pairs, check_split
from sftmix.data import EncodedDataset, Encoder
from sftmix.measure.model import best_evaluation, measure, mixed_share
from sftmix.measure.summary import made_by
from sftmix.model.adapters import described_adapters
from sftmix.model.load import refuse_quantized
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.pipeline.context import Made, RunContext, Stage
from sftmix.pipeline.identity import config_of_arm, is_single_run
from sftmix.pipeline.loaded import export_weights, load_for_run, scorer, scoring_model
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import Stage as TrainingStage
from sftmix.training.scoring import OnlineLosses, merge
from sftmix.types import Rows, Scores, Split, TrainingDynamics

Divided = Callable[[int], tuple[Split, Scores] | None]
"""Epoch, from 0 -> its split and the scores it was made from; None: the epoch has no pairs, only shuffled singles."""


def arm_stage(run: RunContext, name: str, scores: Scores, split: Split | None) -> Stage:
    """Return the stage that trains the target, or the NTP baseline in the same order, and measures and exports it.

    name           train or baseline
    scores, split  from the stages before; a single run takes neither, but makes a split for each epoch
    """
    config, rows, directory = config_of_arm(run.config, name), run.rows, run.path / name

    def make() -> Made:
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
            packed=rows.packed,
            seed=config.seed,
            objective=config.objective,
            perturbation=config.perturbation,
            callbacks=config.callbacks,
            **order_of_arm(run, name, scores, split),
        )
        result = run.train(stage)
        run.directory.tell(doing="measuring the trained model")
        began, steps, module = time.perf_counter(), int(result.figures["steps"]), result.module
        assert stage.scorer is not None
        files, measured = measure(directory, rows.data, stage.scorer, module, groups=rows.eval_groups, step=steps)
        lines = run.world.from_main(lambda: read_steps(directory))
        figures = {
            **result.figures,
            **measured,
            "mixed_token_share": mixed_share(stage.order.batch, lines, rows.data.train.n_targets),
            **best_evaluation(lines, measured.get("eval_nll")),
            "calibration_seconds": time.perf_counter() - began,
            "made_by": made_by(run.world.size),
        }
        run.directory.tell(doing="writing the model")
        weights = full_weights(module)
        run.world.on_main(lambda: export_weights(config, rows.encoder, stage.model, weights, directory / "model"))
        files += ["model", "metrics.jsonl", *(["online"] if (directory / "online").exists() else [])]
        nll = f", held-out NLL {measured['eval_nll']:.4f} per token" if "eval_nll" in measured else ""
        return Made(files, figures, f"{name}: {steps} of {figures['total_steps']} steps{nll}")

    return Stage(name, make)


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
        optimizer=run.config.optimizer,
        options=options,
        checkpoint=checkpoint if name == "train" else replace(checkpoint, keep_best=False),
        directory=run.path / name,
        identity=run.world.from_main(lambda: sha256_file(run.path / name / "inputs.json")),
        seed=seed,
        pad_id=encoder.pad_id,
        scorer=scorer(options, run.world, encoder, name=name, token_nll=token_nll),
        on_progress=lambda step, total: run.directory.status(step=step, total_steps=total, throttle=1.0),
        **more,
    )


def base_stage(run: RunContext) -> Stage:
    """Return the stage that measures the untrained model, once for both arms, and last, so that no step waits for it.

    In a QLoRA run this is the quantised model without the adapters.
    """

    def make() -> Made:
        config, rows = run.config, run.rows
        lora, path = config.model.lora.without_adapters(), config.model.path
        score, module = scoring_model(config, run.world, path, rows.encoder, name="base", packed=rows.packed, lora=lora)
        return Made(*measure(run.path / "base", rows.data, score, module, groups=rows.eval_groups))

    return Stage("base", make)


# ------------------------------------------------------------------------------------------- pairs and their order


def pairs_by(divided: Divided, pairing: PairSampler | None, seed: int) -> Callable[[int], Rows | None]:
    """Return epoch -> its pairs i64[P, 2], or None for shuffled singles."""

    def pairs_of(epoch: int) -> Rows | None:
        groups = divided(epoch)
        if groups is None or pairing is None:
            return None
        pairs = check_pairs(pairing, pairing.pairs(*groups, epoch=epoch, seed=seed), *groups)
        if len(pairs) == 0:
            raise DataError("no pair can be made of the groups of the split; give more rows")
        return pairs

    return pairs_of


def order_of_arm(run: RunContext, name: str, scores: Scores, split: Split | None) -> dict[str, Any]:
    """Return the fields of a training stage that hold its order, which is the same for `train` and `baseline`.

    In a single run each epoch is split by the target's losses in earlier epochs; the first epoch has no split. The
    fields are `order`, the global batches; `split_of`, the split of an epoch; `online`, which records those losses.
    """
    config, single = run.config, is_single_run(run.config)
    # After a callback stopped the target, no losses split later epochs: the baseline has shuffled singles there.
    begun = _epochs_begun(run) if single and name == "baseline" else math.inf

    @lru_cache(maxsize=2)
    def divided(epoch: int) -> tuple[Split, Scores] | None:
        if not single:
            return None if split is None else (split, scores)
        if not 0 < epoch < begun:
            return None
        dynamics = _dynamics(run, epoch)
        confidence = check_confidence(config.confidence, config.confidence.estimate(dynamics), dynamics)
        table = replace(run.rows.table(), confidence=confidence, variability=variability(dynamics))
        return check_split(config.splitter, config.splitter.split(table, seed=config.seed), table), table

    pairs_of = pairs_by(divided, config.resolved_pairing(), config.seed)
    order = TrainingOrder(
        len(run.rows.data.train), pairs_of, options=config.training, seed=config.seed, known=not single
    )
    if single and len(order.ends) < 2:
        raise ConfigError(
            f"--reference {type(config.reference).__name__} needs a second epoch, whose pairs are made from the "
            f"losses of the first, but training has {len(order.ends)}: raise training.epochs (or training.max_steps)"
        )
    online = _losses(run) if single and name == "train" else None
    return {"order": order, "split_of": lambda epoch: (divided(epoch) or (None,))[0], "online": online}


def dynamics_of_single_run(run: RunContext) -> TrainingDynamics | None:
    """Write and return the dynamics behind the last split; None if a callback stopped the first epoch."""
    begun = _epochs_begun(run)
    if begun == 1:
        run.say("train: stopped in the first epoch, before there was a split")
        return None
    dynamics = _dynamics(run, begun - 1)
    run.world.on_main(lambda: write_dynamics(run.path / "confidence" / "dynamics.parquet", dynamics))
    return dynamics


def _losses(run: RunContext) -> OnlineLosses:
    """Return what records the losses of each epoch while the target trains, and reads them back."""
    return OnlineLosses(run.rows.data.train.ids, run.path / "train" / "online", run.world)


def _dynamics(run: RunContext, epoch: int) -> TrainingDynamics:
    """Return the training dynamics by which epoch `epoch`, at least 1, is split."""
    window = run.config.reference.window or epoch  # None: all earlier epochs count
    return merge([_losses(run).read(earlier) for earlier in range(max(0, epoch - window), epoch)])


def _epochs_begun(run: RunContext) -> int:
    """Return how many epochs, at least 1, the finished training began; a callback may have stopped it early."""
    return int(read_steps(run.path / "train")[-1]["epoch"]) + 1
