"""What libraries log: pytest's plugin for that costs each test some milliseconds, and is off."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def messages_of(name: str) -> Iterator[list[str]]:
    """Collect the messages of a logger and of those below it."""
    handler = _Kept()
    logging.getLogger(name).addHandler(handler)
    try:
        yield handler.messages
    finally:
        logging.getLogger(name).removeHandler(handler)
