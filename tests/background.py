"""Long programs that tests wait for run beside the other tests, from the start of the session, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_executor = ThreadPoolExecutor(max_workers=1)
_started: dict[Callable[[], Any], Future] = {}


def start(program: Callable[[], Any]) -> Future:
    """Run ``program`` after those that were started before it; once, however often it is started."""
    if program not in _started:
        _started[program] = _executor.submit(program)
    return _started[program]


def result(program: Callable[[], Any]) -> Any:
    """What it returned; waits for it, and starts it if nobody did."""
    return start(program).result()
