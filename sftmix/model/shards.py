"""The safetensors files of an export, written layer by layer: nobody holds the whole model for them.

The files are those of `save_pretrained`. It has all weights in memory while it reverts what transformers did to them on
loading: it renames weights, cuts merged experts apart, and joins what is one weight in a file.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sftmix.disk.files import write_text
from sftmix.model.rounding import casting

SHARD = "50GB"
"""The largest size of a file, as in `save_pretrained`."""


def write_shards(
    model: PreTrainedModel, directory: Path, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write the weights, floats in `dtype` and a tied group by its first name only (gathering unties them).

    What transformers keeps in float32 stays as it is.

    weights  name and value of each, in the order of the model, which are taken one by one
    """
    cast = casting(model, dtype)
    # of tied weights: {"lm_head.weight"}, beside model.embed_tokens.weight
    aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters())
    like = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in model.state_dict().items()}
    like = {name: cast(name, x) for name, x in like.items() if name not in aliases}
    values = ((name, cast(name, x).cpu()) for name, x in weights if name in like)
    stored = revert_weight_conversion(model, dict(like))
    by_layers = {name: x.shape for name, x in _reverted(model, like.items(), _layer)}
    fits = by_layers == {name: x.shape for name, x in stored.items()}
    split = split_state_dict_into_shards_factory(
        stored,
        get_storage_size=lambda x: x.untyped_storage().nbytes(),
        get_storage_id=lambda x: x.untyped_storage()._cdata,  # parts of one tensor are in one file
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD,
    )
    places: dict[str, tuple[Path, int]] = {}
    for file, names in split.filename_to_tensors.items():
        places |= _begin(directory / file, {name: stored[name] for name in names})
    for name, x in _reverted(model, values, _layer if fits else lambda name: ""):
        _write(*places.pop(name), x)
    if places:
        raise RuntimeError(f"no value came for {', '.join(places)}")
    if len(split.filename_to_tensors) > 1:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def _layer(name: str) -> str:
    """Return the layer of a weight, or its own name: model.layers.0., model.norm.weight."""
    return re.sub(r"(\.\d+\.).*", r"\1", name)


def _reverted(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], part: Callable[[str], str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as files have them, from weights in a row that are of one part of the model."""
    for _, some in itertools.groupby(weights, key=lambda weight: part(weight[0])):
        yield from revert_weight_conversion(model, dict(some)).items()


def _begin(file: Path, like: Mapping[str, Tensor]) -> dict[str, tuple[Path, int]]:
    """Make a file with the header of safetensors and room for the values; return file and offset of each."""
    empty = save({name: torch.empty(0, dtype=x.dtype) for name, x in like.items()}, {"format": "pt"})
    # {"__metadata__": {"format": "pt"}, "lm_head.weight": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}, ...}
    header = json.loads(empty[8:])  # in the order of the values in the file
    places, end = {}, 0
    for name in [name for name in header if name in like]:
        places[name] = end
        end += like[name].nbytes
        header[name] |= {"shape": [*like[name].shape], "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    return {name: (file, 8 + len(text) + place) for name, place in places.items()}


def _write(file: Path, offset: int, x: Tensor) -> None:
    with file.open("r+b") as out:
        out.seek(offset)
        out.write(x.reshape(-1).contiguous().view(torch.uint8).numpy().data)
