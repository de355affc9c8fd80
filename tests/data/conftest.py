"""Tokenizers, rows written to files, and options with a cache of the test's own."""

import json
from collections.abc import Callable

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sftmix.data import LoadedData, Prepared, encode_dataset, prepare
from sftmix.options import DataOptions
from sftmix.text.encoder import Encoder
from sftmix.words.errors import DataError
from tests.text.small_tokenizers import REAL, SMALL


@pytest.fixture(scope="session")
def small_tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """The small tokenizers by name."""
    return {name: make() for name, make in SMALL.items()}


@pytest.fixture(scope="session", params=[*SMALL, *REAL])
def tokenizer(request) -> PreTrainedTokenizerBase:
    """Every tokenizer in turn; the real ones where the shared folder is there."""
    if request.param in SMALL:
        return SMALL[request.param]()
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / REAL[request.param])


@pytest.fixture
def write(tmp_path) -> Callable[[str, object], str]:
    """write(name, rows) -> path; bytes and text as they are, a list as JSONL or (.json) as an array."""

    def write_file(name: str, content: object) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")  # type: ignore[attr-defined]
        return str(path)

    return write_file


@pytest.fixture
def options(tmp_path) -> Callable[..., DataOptions]:
    """DataOptions with a cache of the test's own."""
    return lambda *train, **more: DataOptions(train=list(train), cache_dir=str(tmp_path / "cache"), **more)


@pytest.fixture
def read(options) -> Callable[..., Prepared]:
    """prepare, by the names of the training files."""
    return lambda *train, run_seed=0, row_format=None, **more: prepare(options(*train, **more), run_seed, row_format)


@pytest.fixture
def load(read) -> Callable[..., LoadedData]:
    """prepare and encode_dataset, by the names of the training files."""

    def load_files(encoder: Encoder, *train: str, max_length: int = 64, **more: object) -> LoadedData:
        return encode_dataset(read(*train, **more), encoder, max_length=max_length)

    return load_files


@pytest.fixture
def refused(read) -> Callable[..., list[str]]:
    """Lines of the DataError with which `read` ends."""

    def lines(*train: str, **more: object) -> list[str]:
        with pytest.raises(DataError) as caught:
            read(*train, **more)
        return str(caught.value).splitlines()

    return lines
