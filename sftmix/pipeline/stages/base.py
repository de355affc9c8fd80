"""The untrained model, measured once for both arms, and last, so that no step waits for it."""

from sftmix.pipeline.context import Made, RunContext, StageSpec, Values
from sftmix.pipeline.inputs import Known, rows_and_model
from sftmix.pipeline.validity import Inputs


def inputs(known: Known) -> Inputs:
    return {
        **rows_and_model(known),
        "eval": known.rows.eval_fingerprint,
        "quantize": known.config.model.lora.quantize,  # the base of QLoRA is measured as it is trained on
    }


def make(run: RunContext, values: Values) -> Made:
    """Measure the model; in a QLoRA run this is the quantised model without the adapters."""
    from sftmix.measure.model import measure
    from sftmix.pipeline.loaded import scoring_model

    config, rows = run.config, run.rows
    lora, path = config.model.lora.without_adapters(), config.model.path
    score, module = scoring_model(config, run.world, path, rows.encoder, name="base", packed=rows.packed, lora=lora)
    return Made(*measure(run.path / "base", rows.data, score, module))


BASE = StageSpec(
    name="base",
    wanted=lambda wants: wants.training,
    inputs=inputs,
    make=make,
    by_ranks=True,
)
