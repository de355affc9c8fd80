"""Finished models in memory, which answer; and whether the base model of a run is still the one it was made from."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from sftmix.data import prepare
from sftmix.disk.hashes import sha256_json
from sftmix.disk.places import started
from sftmix.model.adapters import quantization_config
from sftmix.model.compared import apart, longest_window, probe_ids, probing, say_once
from sftmix.model.load import check_ids, fingerprint, load_model, load_tokenizer, own_ends, stored_dtype
from sftmix.model.paths import ADAPTERS, named
from sftmix.model.probes import context_length, position_border, probe_logits
from sftmix.options.data import DataOptions
from sftmix.options.model import ModelOptions
from sftmix.pipeline.start import made_from
from sftmix.ranks.world import accelerator
from sftmix.text.encoder import Encoder, encoder_for
from sftmix.tools.runs.adapters import load_adapters, stored_config
from sftmix.tools.runs.models import FinishedModel, Functions, Turns
from sftmix.tools.runs.read import as_started, read_finished
from sftmix.tools.runs.rows import another_model, refuse_gone
from sftmix.words.errors import NonFiniteError


class LoadedModel(NamedTuple):
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
    together: int  # the length of rows up to which a batch changes no answer

    def render(self, messages: Turns, tools: Functions = ()) -> list[int]:
        """Return the ids of the prompt: the conversation so far and the generation prompt, as in training.

        Special tokens that a turn spells are text, unless the run was trained on them as tokens.

        messages  [{role: ..., content: ..., and thought, tool_calls, tool_call_id, name}, ...], the last one of a user
                   or a tool
        tools     the functions that the assistant may call
        Raises `sftmix.text.templates.TemplateRefusal` where the template refuses the conversation, ConfigError where it
        has a token without an embedding.
        """
        ids = self.encoder.prompt(messages, tools)
        with named(f"model {self.name}"):
            check_ids(self.model.config, self.encoder.tokenizer, ids)
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode an answer, without the end of its turn and what the template writes around it."""
        return self.encoder.renderer.text_of(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)


def weights_of(finished: FinishedModel) -> str:
    """Return the identity of a model's weights; of adapters that are no run's, their base model's as well."""
    own, directory = fingerprint(finished.path), Path(finished.path)
    if finished.run is None and (directory / ADAPTERS).exists():
        # Equal adapters on other weights are another model.
        with as_started(None):
            return sha256_json([own, fingerprint(_base_of(directory))])
    return own


def _base_of(adapters: Path) -> str:
    """Return the base model that adapters name; its hub id means the commit they name, until `as_started` ends."""
    config = stored_config(adapters)
    base = config.base_model_name_or_path
    if config.revision:
        started.set(started.get()._replace(model=f"{base}@{config.revision}"))
    return base


def load_finished(finished: FinishedModel, dtype: str = "auto") -> LoadedModel:
    """Load a model with its tokenizer, on a GPU if there is one; adapters are loaded onto their base model.

    dtype  of the weights, by its name in torch; auto: as they are stored
    Raises ConfigError if the model cannot be loaded or its tokenizer does not fit, NonFiniteError if it computes NaN.
    """
    encoder, directory = encoder_of(finished), Path(finished.path)
    options = ModelOptions() if finished.run is None else read_finished(finished.run).model
    asked = None if dtype == "auto" else getattr(torch, dtype)
    adapters = (directory / ADAPTERS).exists()
    with named(f"model {finished.name}"), as_started(finished.run):
        base = finished.path
        if adapters:  # of a run its own record of the base counts, which is found after a move, too
            base = options.path or _base_of(directory)
        kind = asked or stored_dtype(base)
        quantization = None
        if adapters or finished.name == "base":  # of a run with adapters: quantised as it was in training
            quantization = quantization_config(options.lora, compute=kind if adapters else asked or torch.float32)
        model = load_model(base, dtype=kind, attention=options.attention, quantization=quantization)
        if adapters:
            load_adapters(model, directory)
        check_ids(model.config, encoder.tokenizer, [encoder.pad_id, *encoder.stop_ids])
    if getattr(model, "hf_device_map", None) is None:  # 4-bit weights lie where they were loaded
        model.to(accelerator())  # type: ignore[arg-type]
    ends = {*encoder.stop_ids, *own_ends(model)}
    model.generation_config = GenerationConfig()  # the base model's own sampling options would enter every answer
    model.config.get_text_config().output_router_logits = False  # of a batch with padding their balance has no value
    if not (probe_logits(model.eval()) < torch.inf).all():  # NaN: it would answer with token 0 for ever; -inf is usual
        raise NonFiniteError(
            f"{finished.path}: its logits are not finite in {model.dtype}, so its answers would mean nothing. Its "
            "weights are broken, or they are too large for this dtype: try --dtype float32"
        )
    context = context_length(model.config)
    return LoadedModel(finished.name, model, encoder, tuple(ends), context, longest_together(model, finished.name))


def encoder_of(finished: FinishedModel) -> Encoder:
    """Return the encoder of the run's training; of other models, and after plain text, the tokenizer's own template.

    Raises ConfigError unless the base model of a run is the one that the run was made from, if the base is needed:
    whole weights that were exported with their tokenizer need none.
    """
    run, path = finished.run, finished.path
    adapters = (Path(path) / ADAPTERS).exists()
    options = DataOptions()
    renderer = thinks = None
    with named(f"model {finished.name}"), as_started(run):
        if run is not None:
            config, then = read_finished(run), made_from(run)["model"]
            path = config.model.path
            exported = run / "train/model"
            if then and (adapters or finished.name == "base" or not exported.is_dir()):
                refuse_gone(run, path, then)
                if fingerprint(path) != then:
                    raise another_model(run, path)
            renderer = config.renderer
            options = replace(config.data, format="auto")  # `text` renders no turns, and nothing could be asked
            if exported.is_dir():  # its template has the generation prompt of the rows
                path, options = str(exported), replace(options, template=None, template_options=None)
                renderer = None
            else:
                thinks = prepare(config.data, config.seed, config.row_format).thinks
        elif adapters and not any(Path(path).glob("tokenizer*")):  # as PEFT writes them
            path = _base_of(Path(path))
        return encoder_for(load_tokenizer(path), options, renderer, thinks=thinks)


def longest_together(model: Any, name: str) -> int:
    """Return the length of rows up to which a batch changes no answer, and say it; 0 if padding on the left does.

    A recurrent state, a convolution or a window of compressed tokens may see padding: a prompt that fills the longest
    such window (DeepSeek-V4's) is continued beside a longer one, and alone.
    """
    ids = probe_ids(model, 2, 12 + longest_window(model))  # [2, 12], of DeepSeek-V4 [2, 12 + 128]
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # the second row has 7 tokens of padding, and 5 of its own
    options = GenerationConfig(max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with probing(model, f"{name} does not generate"):
        # The second new token goes on from the cache or the state, in which padding may have left something.
        beside = model.generate(ids, attention_mask=mask, generation_config=options)
        alone = model.generate(ids[1:, 7:], attention_mask=mask[1:, 7:], generation_config=options)
    longest = 0 if apart(beside.logits[-1][-1], alone.logits[-1][-1]) else position_border(model.config)
    if longest < sys.maxsize:
        say_once(f"model {name}: a batch changes answers, so prompts of more than {longest} tokens are answered alone")
    return longest
