"""The fixtures of the tests in tests/data, for text that comes from files."""

from tests.data.conftest import load, options, read, refused, small_tokenizers, tokenizer, write  # noqa: F401, fixtures
