"""What the readers of data say while a command runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pecker_fast.data.dataset import LOGGER


class _Listener(logging.Handler):
    """Keeps every sentence, once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.said.setdefault(record.getMessage())


@contextmanager
def listening() -> Iterator[dict[str, None]]:
    """Within the block: which split was taken, what was left out; in the order in which it is said."""
    logger, listener = logging.getLogger(LOGGER), _Listener()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    try:
        yield listener.said
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
