"""Files of rows -> checked conversations -> stored token ids with a mask of the response tokens; or packed windows.

`prepare` reads and checks rows (no tokenizer needed), `encode_dataset` tokenises them by an encoder of `sftmix.text`.
"""

from sftmix.data.dataset import EncodedDataset, LoadedData, encode_dataset
from sftmix.data.report import DataReport
from sftmix.data.sides import prepare
from sftmix.data.store import Prepared

__all__ = ["DataReport", "EncodedDataset", "LoadedData", "Prepared", "encode_dataset", "prepare"]
