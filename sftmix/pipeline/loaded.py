"""Finished models in memory, with the chat template and the stop ids under which they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from sftmix.common.errors import NonFiniteError
from sftmix.common.plain import as_list
from sftmix.common.world import accelerator
from sftmix.config.read import read_finished
from sftmix.data.encoders import encoder_for
from sftmix.data.formats import TEXT
from sftmix.data.templates import Encoder
from sftmix.model.adapters import base_of_adapters, load_adapters, quantization_config
from sftmix.model.load import check_vocabulary, load_model, load_tokenizer, probe_ids, stored_dtype
from sftmix.model.paths import named
from sftmix.options import DataOptions, ModelOptions
from sftmix.pipeline.finished import FinishedModel


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and how conversations become its token ids.

    encoder   tokenizer and chat template; of a run those of its training, for all models of the run
    stop_ids  ids at which an answer ends: the end of a turn, eos, and those of the model's generation_config
    context   positions that the model was made for; None if its config does not say
    """

    name: str
    model: PreTrainedModel
    encoder: Encoder
    stop_ids: tuple[int, ...]
    context: int | None

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of the prompt: the conversation so far and the generation prompt, as in training.

        Special tokens that a turn spells are text, unless the run was trained on them as tokens.

        messages  [{role: ..., content: ...}, ...], the last one of a user
        Raises `sftmix.data.templates.TemplateRefusal` where the template refuses the conversation.
        """
        turns = [{**turn, "content": self.encoder.content(turn["content"])} for turn in messages]
        return self.encoder.tokenize(self.encoder.render([turns], prompt=True))[0]

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode an answer, without the end of its turn and the white space that the template writes around it."""
        answer = list(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        end = str(self.encoder.tokenizer.convert_ids_to_tokens(self.encoder.end_of_turn_id))
        before_end = self.encoder.ending.removesuffix(end)
        text = str(self.encoder.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text.removeprefix(self.encoder.lead).removesuffix(before_end)


def load_finished(finished: FinishedModel, dtype: str = "auto") -> LoadedModel:
    """Load a model with its tokenizer, on a GPU if there is one; adapters are loaded onto their base model.

    dtype  of the weights, by its name in torch; auto: as they are stored
    Raises ConfigError if the model cannot be loaded or its tokenizer does not fit, NonFiniteError if it computes NaN.
    """
    encoder = encoder_of(finished)
    with named(finished.option):
        model = _weights(finished, None if dtype == "auto" else getattr(torch, dtype))
        check_vocabulary(model, encoder.tokenizer)
    if getattr(model, "hf_device_map", None) is None:  # 4-bit weights lie where they were loaded
        model.to(accelerator())  # type: ignore[arg-type]
    ends = as_list(getattr(model.generation_config, "eos_token_id", None))
    stop = dict.fromkeys([*encoder.stop_ids, *ends])
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    model.generation_config = GenerationConfig()  # the base model's own sampling options would enter every answer
    with torch.no_grad():  # a model without a greatest logit would still answer, with token 0 for ever
        logits = model.eval()(input_ids=probe_ids(model, 1, 8)).logits
        finite = (logits < torch.inf).all()  # NaN is not, and some models have -inf
    if not finite:
        wider = "" if model.dtype == torch.float32 else ", or they are too large for this dtype: try --dtype float32"
        raise NonFiniteError(
            f"{finished.path}: its logits are not finite in {str(model.dtype).removeprefix('torch.')}, so its "
            f"answers would mean nothing. Its weights are broken{wider}"
        )
    return LoadedModel(finished.name, model, encoder, tuple(i for i in stop if i is not None), context)


def encoder_of(finished: FinishedModel) -> Encoder:
    """Return the encoder of the run's training; of other models, and after plain text, the tokenizer's own template."""
    path, options = finished.path, DataOptions()
    if finished.run is not None:
        config = read_finished(finished.run)
        path, options = config.model.path, options if config.data.format == TEXT else config.data
    with named(finished.option):
        return encoder_for(load_tokenizer(path), options)


def _weights(finished: FinishedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the weights of a model; dtype None: as they are stored."""
    options = ModelOptions() if finished.run is None else read_finished(finished.run).model
    adapters = (Path(finished.path) / "adapter_config.json").exists()
    base = base_of_adapters(Path(finished.path)) if adapters else finished.path
    kind, quantization = dtype or stored_dtype(base), None
    if adapters or finished.name == "base":
        quantization = quantization_config(options.lora, compute=kind if adapters else dtype or torch.float32)
    model = load_model(base, dtype=kind, attention=options.attention, quantization=quantization)
    if adapters:
        load_adapters(model, Path(finished.path))
    return model
