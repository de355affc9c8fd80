"""What a run has stored of a training, as a Hugging Face directory."""

from pathlib import Path

from sftmix.config import RunConfig
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.model.paths import ADAPTERS
from sftmix.pipeline.loaded import export_dtype, export_weights, round_weights
from sftmix.ranks.world import World
from sftmix.text.encoder import Encoder
from sftmix.tools.runs.adapters import load_adapters, merge_adapters
from sftmix.training.checkpoint import CheckpointStore
from sftmix.training.module import TrainingModule


def export_stored(
    config: RunConfig, encoder: Encoder, source: Path, to: Path, *, step: int | None, dtype: str, merge: bool
) -> int | None:
    """Write what a run has stored as a Hugging Face directory; return the step, None for a directory of adapters.

    encoder  of the run's training
    source   a folder of checkpoints, of which `step` counts, or the newest one; or a directory of adapters
    merge    write the whole model with the adapters in its weights
    """
    model = load_model(config.model.path)
    stored_adapters = (source / ADAPTERS).exists()
    if stored_adapters:
        load_adapters(model, source)  # train/model, of a run whose checkpoints are gone
    elif config.model.lora.r:
        add_adapters(model, config.model.lora, seed=0)  # whose values are in `source`
    module = TrainingModule(model)
    if not stored_adapters:
        store = CheckpointStore(source, keep=1, world=World())
        while True:
            steps = store.steps()
            try:
                chosen = steps[0] if step is None else step
                store.load(chosen, module, None)
                break
            except Exception:  # a run beside this may have removed it, whichever file was missed first
                # A step that was named cannot be another; without a change of the folder the error is a real one.
                if step is not None or store.steps() == steps:
                    raise
        step = chosen
    if merge:
        merge_adapters(model)
    exported = export_dtype(config.model, dtype, merged=merge)
    round_weights(config, module, exported)
    export_weights(config, encoder, module, to, exported, World())
    return step
