"""What is trained in the end: the target, and the NTP baseline beside it."""

from dataclasses import replace
from functools import partial

from sftmix.components.component import to_builtin
from sftmix.config import RunConfig
from sftmix.config.wants import reads_scores
from sftmix.disk.files import read_steps
from sftmix.pipeline.context import Made, RunContext, StageSpec, Values
from sftmix.pipeline.inputs import (
    Known,
    config_of_arm,
    deciding_callbacks,
    deciding_options,
    files_read,
    hash_of,
    rows_and_model,
)
from sftmix.pipeline.stages.selection import CHOSEN
from sftmix.pipeline.validity import Inputs
from sftmix.words.errors import ConfigError


def inputs(name: str, known: Known) -> Inputs:
    """Return the inputs of a trained arm; their order is part of its checkpoints' identity."""
    config, lora = config_of_arm(known.config, name), known.config.model.lora
    pairing, wants = known.config.resolved_pairing(), known.wants  # both arms have one order
    deciding, paired = deciding_callbacks(config.callbacks), wants.pairs and not wants.single_run
    # Pair samplers and orders see the confidence as well.
    scored = (paired and wants.by_confidence) or reads_scores(config.order)
    order = {"order": to_builtin(config.order)} if config.order else {}
    choice = {"choice": hash_of(known, CHOSEN)} if wants.choice else {}
    found = {
        **rows_and_model(known),
        "eval": known.rows.eval_fingerprint,  # decides figures, and where EarlyStopping stops
        "dtype": config.model.dtype,  # of the export, as is the rounding
        "rounding": known.world.from_main(lambda: _rounding(config)),
        "lora": to_builtin(lora) if lora.r else None,
        "split": hash_of(known, "split/split.parquet", paired),  # the groups themselves, whichever splitter made them
        "confidence": hash_of(known, "confidence/confidence.parquet", scored),
        **choice,
        **order,
        "pairing": to_builtin(pairing),
        "objective": config.objective.spec(),
        "optimizer": config.optimizer.spec(),
        "perturbation": to_builtin(config.perturbation),
        "seed": config.seed,
        "files": files_read(
            known, pairing, config.order, config.objective, config.optimizer, config.perturbation, *deciding
        ),
        "training": deciding_options(known, config.training),
        "callbacks": to_builtin(deciding),
    }
    if wants.single_run:
        chosen = (config.reference, config.confidence, config.splitter)
        # A split for each epoch is no file: what makes it counts itself.
        found["online"] = [{**component.spec(), "files": files_read(known, component)} for component in chosen]
    return found


def _rounding(config: RunConfig) -> str:
    """Return how the weights of the export are rounded; nearest if they are not."""
    from sftmix.pipeline.loaded import export_dtype

    return config.checkpoint.rounding if export_dtype(config.model).itemsize < 4 else "nearest"


def make(name: str, run: RunContext, values: Values) -> Made:
    """Train an arm, and measure and export its model; a single run takes no split, but makes one for each epoch."""
    from sftmix.pipeline.arm import make_arm

    return make_arm(run, name, values["confidence"], values.get("split"), values.get("choice"))


def _check_order(run: RunContext, values: Values) -> None:
    """Raise ConfigError for a baseline that has had other examples than the target in a step that both have made."""

    def check() -> None:
        target, baseline = (
            {line["step"]: line.get("rows") for line in read_steps(run.path / name)} for name in ("train", "baseline")
        )
        both = [(step, target[step], rows) for step, rows in baseline.items() if step in target]
        others = [step for step, one, other in both if None not in (one, other) and one != other]
        if others:
            raise ConfigError(
                f"{run.path / 'baseline'}: from step {min(others)} on it has other examples than train, as of another "
                "target; move it away, or use another --out"
            )

    run.world.on_main(check)


TRAIN = StageSpec(
    name="train",
    wanted=lambda wants: wants.training,
    inputs=partial(inputs, "train"),
    make=partial(make, "train"),
    result="train/model",
    by_ranks=True,
    has_steps=True,
)

BASELINE = replace(
    TRAIN,
    name="baseline",
    read=_check_order,
    wanted=lambda wants: wants.training and wants.config.with_baseline,
    inputs=partial(inputs, "baseline"),
    make=partial(make, "baseline"),
    result="",
)
