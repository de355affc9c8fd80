"""Rows -> conversations -> token ids with a mask of the response tokens; or documents -> packed windows.

`prepare` reads and checks rows (no tokenizer needed), `make_encoder` chooses the chat template, `encode` tokenises.
"""

from sftmix.data.dataset import EncodedDataset, LoadedData, encode
from sftmix.data.encoder import Encoder, encoder_for, make_encoder
from sftmix.data.renderer import ChatTemplate
from sftmix.data.report import DataReport
from sftmix.data.rows import prepare
from sftmix.data.store import Prepared

__all__ = [
    "ChatTemplate",
    "DataReport",
    "EncodedDataset",
    "Encoder",
    "LoadedData",
    "Prepared",
    "encode",
    "encoder_for",
    "make_encoder",
    "prepare",
]
