"""Hugging Face causal language models and tokenizers: loading, and the facts known before any weight is read."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)

from sftmix.disk.hashes import sha256_json
from sftmix.disk.known import known_hash
from sftmix.disk.places import place_of
from sftmix.model.admitted import (
    TOKENIZER,
    ModelFiles,
    admit,
    admit_weights,
    admitted_files,
    find_model,
    quantized_by,
    weight_files,
)
from sftmix.model.compared import say_once, some
from sftmix.model.layers import freeze_unused
from sftmix.model.paths import ADAPTERS, holds_adapters, refuse_files
from sftmix.words.errors import ConfigError
from sftmix.words.given import as_list
from sftmix.words.progress import without_bars_of_transformers

# ------------------------------------------------------------------------------------------------- loading


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load the causal language model of a hub id or directory: weights cast to `dtype`, vocabulary as it is.

    What text never goes through is frozen (`sftmix.model.layers`).

    quantization  a transformers quantisation config (`sftmix.model.adapters.quantization_config`)

    Reads safetensors only and runs no code that comes with the model. Raises ConfigError if there is no such model, if
    it needs such code or has no safetensors, or if the files hold another model than config.json describes.
    """
    with without_tables():
        model, info = _from_pretrained(
            AutoModelForCausalLM,
            path,
            dtype=dtype,
            attn_implementation=attention,
            experts_implementation=None,  # nor is this the file's word: some are kernels of the hub
            quantization_config=quantization,
            use_safetensors=True,
            output_loading_info=True,
        )
    _check_files(model, path, info["missing_keys"], info["unexpected_keys"])
    own_ends(model)
    if getattr(model.get_output_embeddings(), "weight", None) is not model.get_input_embeddings().weight:
        untie(model)  # transformers does not tie what differs in the files, and says so; so the export is not, either
    for module in model.modules():
        # On a CPU with bf16 instructions bitsandbytes repacks 4-bit weights in the first forward in eval mode, for a
        # kernel without a gradient: scoring between two steps would end the training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, of a class that is not imported here
    return freeze_unused(model)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id or directory; ConfigError if there is none or it needs code of its own.

    Some classes of transformers keep the vocabulary of tokenizer.json and split text in their own way, so that a model
    would be trained on tokens that it was not made with: then the file is read by the class that takes it whole. A text
    has the same ids each time: dropout of merges is left out, also of what is exported.
    """
    tokenizer = _from_pretrained(AutoTokenizer, path)
    file = find_model(path).directory / TOKENIZER
    if type(tokenizer) is not TokenizersBackend and file.is_file() and not _is_that_of(tokenizer, file):
        own = type(tokenizer).__name__
        say_once(
            f"model.path: {path}: {own} of transformers splits text otherwise than tokenizer.json, which is followed"
        )
        tokenizer = _from_pretrained(TokenizersBackend, path)
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        say_once(f"model.path: {path}: the dropout of tokenizer.json is left out: a text has the same ids each time")
        model.dropout = None
    return tokenizer


def _is_that_of(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Return True if a tokenizer normalises, splits and merges text as its file says."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:  # as of mistral-common, which reads another
        return False
    stored = json.loads(file.read_bytes())
    # BPE has fuse_unk, byte_fallback, ... as attributes (a class's "" for a file's null), but not type, vocab, merges.
    model = {name: value for name, value in stored["model"].items() if name != "dropout"}
    if any((getattr(backend.model, name, value) or None) != (value or None) for name, value in model.items()):
        return False
    # Read by the library, so that options which the file leaves out are there.
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    rules = Tokenizer.from_str(json.dumps({**stored, "added_tokens": [], "post_processor": None, "model": empty}))
    return _rules_of(rules) == _rules_of(backend)


def _rules_of(backend: Tokenizer) -> list[str | None]:
    # ['{"type":"NFC"}', '{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}']
    return [part and part.__getstate__().decode() for part in (backend.normalizer, backend.pre_tokenizer)]


def model_config(path: str | Path) -> PretrainedConfig:
    """Load the config of a hub id or directory; ConfigError if there is none or it needs code of its own."""
    return _from_pretrained(AutoConfig, path)


def stored_weights(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and weights, mapped from the files of a directory or hub id; ConfigError as `admit_weights`."""
    for file in filter(Path.exists, weight_files(find_model(path), model_config(path))):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                yield name, opened.get_tensor(name)


def stored_dtype(path: str | Path) -> torch.dtype:
    """Return the dtype of the stored weights, by the model's config; float32 if it does not say."""
    config: Any = model_config(path)
    return config.dtype or config.get_text_config().dtype or torch.float32


def refuse_quantized(path: str | Path) -> None:
    """Raise ConfigError for a model whose stored weights are quantised: they have no gradient to train them with."""
    for method in quantized_by(model_config(path)):
        raise ConfigError(
            f"model.path: the weights of {path} are quantised ({method}), and such weights cannot be trained. Name the "
            "model it was made from, or another copy that is not quantised; --model.lora.quantize 4bit quantises that "
            "one while it is loaded, and trains adapters"
        )


def untie(model: PreTrainedModel) -> None:
    """Let the configuration say that input embeddings and LM head are not tied."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


@contextmanager
def without_tables() -> Iterator[None]:
    """Silence transformers' bars, and its table of weights that differ, for who looks at these himself."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_table)
    try:
        with without_bars_of_transformers():
            yield
    finally:
        logger.removeFilter(_is_no_table)


def _is_no_table(record: logging.LogRecord) -> bool:
    """Return False for transformers' table of weights, unless its error refers to it."""
    return not re.search(r"LOAD REPORT(?!.*(MISMATCH|CONVERSION))", record.getMessage(), re.DOTALL)


def _passed_over(model: PreTrainedModel, path: str | Path) -> set[str]:
    """Return the names of the weights that transformers leaves out by rule, such as those of multi-token prediction.

    Buffers that older versions wrote are no weights.
    """
    own, ignored = "\n".join(dict(model.named_parameters())), model._keys_to_ignore_on_load_unexpected or ()
    # GLM 4.5's rules name layers by number (model\.layers\.46.*, 92): in a model with more layers they are its own.
    rules = "|".join(rule for rule in ignored if not re.search(rule, own, re.MULTILINE))
    if not rules:
        return set()
    buffers = re.compile(r"(inv_freq|position_ids|attn\.(masked_)?bias)$")  # the latter is GPT-2's causal mask
    return {name for name, _ in stored_weights(path) if re.search(rules, name) and not buffers.search(name)}


def _check_files(model: PreTrainedModel, path: str | Path, missing: set[str], others: set[str]) -> None:
    """Raise ConfigError unless the files hold all weights of the model, and no others of its decoder and LM head.

    What else they hold, such as a vision tower or a value head, is left out, with a line on stderr.
    """
    if missing:
        raise ConfigError(f"model.path: {path} has no values for {some(missing, 'weights of the model')}.")
    names, decoder = {part: name for name, part in model.named_modules()}, model.get_decoder()
    parts = "|".join(name for name, _ in decoder.named_children())
    # PEFT's prefix, if adapters were saved with their model; or none, if the backbone was saved alone.
    # Llama: (base_model\.model\.)?((model\.)?(embed_tokens|layers|norm|rotary_emb)|lm_head)\.
    own = rf"(base_model\.model\.)?(({names[decoder]}\.)?({parts})|{names.get(model.get_output_embeddings())})\."
    if inside := [name for name in others if re.match(own, name)]:
        raise ConfigError(
            f"model.path: {path} holds {some(inside)} for which {type(model).__name__} has no place by config.json: "
            "another model would be trained. Mend config.json (num_hidden_layers, attention_bias, ...), or merge "
            "adapters into their base model with PEFT (merge_and_unload), or take the weights out of the files"
        )
    if left := others | _passed_over(model, path):
        say_once(f"model.path: {path}: left out {some(left)}, no part of {type(model).__name__}")


def own_ends(model: PreTrainedModel) -> list[int]:
    """Return the ids that end an answer by generation_config.json, or config.json; ConfigError if they are no ids."""
    ends = as_list(getattr(model.generation_config, "eos_token_id", None))
    ids = [str(end) for end in ends if end is not None]
    if not all(re.fullmatch(r"-?\d{1,9}", number) for number in ids):  # {"a": 1}, "x", 10 ** 40, true
        raise ConfigError(
            f"model.path: {model.name_or_path} has eos_token_id: {ends!r:.80} in its generation_config.json, or "
            "config.json; allowed: the id of a token, or a list of ids"
        )
    return list(map(int, ids))


def check_ids(config: PretrainedConfig, tokenizer: object, ids: Iterable[int]) -> None:
    """Refuse ids without an embedding or a row of the LM head (spare embeddings are normal; nothing is resized).

    ids  those that rows, padding and the end of answers make, or the greatest of them
    """
    highest, size = max(ids), config.get_text_config().vocab_size
    if highest >= size:
        raise ConfigError(  # a Trainer may have a processor, or none
            f"model.path: the token {getattr(tokenizer, 'convert_ids_to_tokens', str)(highest)!r} has id {highest}"
            f", the model embeddings for {size} ids: its tokenizer is another model's, or tokens were added "
            "without resizing the model"
        )


def _from_pretrained(auto: Any, path: str | Path, **options: Any) -> Any:
    reads_tokenizer = auto in (AutoTokenizer, TokenizersBackend)
    private = name = str(path)
    try:
        model = find_model(path)
        if not reads_tokenizer:  # adapters may have a tokenizer beside them
            refuse_files(path)
            if (model.directory / ADAPTERS).exists():  # of a hub id; transformers would load its base
                raise holds_adapters(path)
        name, private = model.name, str(admit(model))
        config = _config_in(private, name, reads_tokenizer)
        if auto is AutoConfig:
            return config
        if not reads_tokenizer:
            admit_weights(model, Path(private), config)
        with without_bars_of_transformers():
            chosen = {} if auto is TokenizersBackend else {"config": config}
            loaded = auto.from_pretrained(private, trust_remote_code=False, **chosen, **options)
        if reads_tokenizer:
            loaded.convert_ids_to_tokens(loaded.all_special_ids)  # "bos_token": {"a": 1} is a token without an id
        _name(loaded[0] if isinstance(loaded, tuple) else loaded, model)
        return loaded
    except ConfigError:
        raise
    except BaseException as error:  # files of strangers make transformers raise anything
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):  # of tokenizers, in Rust
            raise
        if "trust_remote_code" in str(error):  # "Please pass the argument `trust_remote_code=True` to allow custom ..."
            raise ConfigError(
                f"model.path: {path} needs code of its own (auto_map in its files), and code that comes with a model "
                "is never run. Name a model whose model_type and tokenizer are part of transformers, or convert this "
                "one to such a type"
            ) from error
        raise ConfigError(f"model.path: cannot load {path}: {str(error).replace(private, name)}") from error


def _name(loaded: Any, model: ModelFiles) -> None:
    """Let a model or tokenizer have the name that it was asked for, not its private directory's."""
    loaded.name_or_path = model.name
    if isinstance(loaded, PreTrainedModel):
        loaded.config.name_or_path = model.name
    else:
        loaded.init_kwargs |= {"name_or_path": model.name, "is_local": model.local}  # which an export writes


def _config_in(private: str, name: str, tokenizer: bool) -> PretrainedConfig:
    """Return the configuration in the private directory of a model, whose name it has.

    tokenizer  True: it only chooses the tokenizer, which may be without a model
    """
    try:
        # by "model_type" alone: without it transformers guesses from the name of the directory
        if not (tokenizer or PretrainedConfig.get_config_dict(private)[0].get("model_type")):
            raise ValueError("config.json names no model_type")
        config = AutoConfig.from_pretrained(private, trust_remote_code=False)
    except (ValueError, OSError):
        if not tokenizer:
            raise
        config = PretrainedConfig.from_pretrained(private)
    config._name_or_path = name  # by which transformers knows some tokenizers
    return config


MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Suffixes of the files that decide weights, tokenizer and chat template of a model directory."""


def fingerprint(path: str) -> str:
    """Return the identity of a file's content, or of a model and tokenizer: a hub commit, or a directory's hash."""
    place = place_of(path)
    if place.is_file():
        return _hash(place)
    if not place.is_dir():
        model_config(path)
        return f"{path}@{find_model(path).directory.name}"  # .../models--OWNER--NAME/snapshots/COMMIT
    files = {file for file in place.iterdir() if file.suffix in MODEL_FILES and file.is_file()}
    files |= set(admitted_files(place).values())  # also in folders below
    return sha256_json({file.relative_to(place).as_posix(): _hash(file) for file in files})


def _hash(path: Path) -> str:
    """Return the hash of a file; it is looked for again only if its size, time or inode changed."""
    about = path.stat()
    return _hash_of(path, about.st_size, about.st_mtime_ns, about.st_ino)


@cache
def _hash_of(path: Path, *state: int) -> str:
    return known_hash(path)
