"""What the safetensors files of a model say of their tensors, without reading these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes by their names in safetensors files."""


def dtypes_of_files(path: str | Path) -> set[torch.dtype | None]:
    """Return the dtypes of all tensors in the files of a hub id or directory, None for one that is no float.

    Empty if there are no files here, as before a model of the hub is loaded.
    """
    return {
        _DTYPES.get(file.get_slice(name).get_dtype())
        for place in _files(path)
        for file in [safe_open(place, framework="pt")]
        for name in file.keys()  # noqa: SIM118 (not a dict)
    }


def _files(path: str | Path) -> Iterator[Path]:
    """Yield the safetensors files of a model, one or several."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            place = cached_file(str(Path(path).expanduser()), name, local_files_only=True)
        except OSError:
            continue
        found = Path(str(place))
        if name == SAFE_WEIGHTS_NAME:
            yield found
        else:
            yield from {found.parent / file for file in json.loads(found.read_text())["weight_map"].values()}
        return
