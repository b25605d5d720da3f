"""Which of several ways to compute the same is fastest on this machine: measured once, remembered, and told."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Way = Callable[[], object]

ROUNDS = 5
FLUSHED_BYTES = 256 << 20
"""More than any GPU's cache holds."""
FLUSHES, MOST_FLUSHES = 4, 64
"""How often the cache is overwritten before a way is timed, at least and at most: 0.3 to 6 ms of a large GPU's time."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        used: Name of the way that is used.
        why: "measured", or why nothing was measured.
        ms: Name of every way -> its median milliseconds; empty where nothing was measured.
    """

    used: str
    why: str = "measured"
    ms: Mapping[str, float] = field(default_factory=dict)


def fastest(ways: Mapping[str, Way], device: torch.device) -> Choice:
    """The way with the lowest median time, each run in turn; every way is called ``1 + ROUNDS`` times or a few more.

    A way that fails, because it does not compile or needs more memory than there is, is left out with a warning.
    """
    timer = functools.partial(_gpu_ms, device) if device.type == "cuda" else _cpu_ms
    ways = _working(ways, timer)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(timer(way))
    ms = {name: statistics.median(values) for name, values in times.items()}
    return Choice(min(ms, key=lambda name: ms[name]), ms=ms)


def _working(ways: Mapping[str, Way], timer: Callable[[Way], float]) -> dict[str, Way]:
    """Those that run through; the first call also compiles, and fills caches of algorithms."""
    working, failed = {}, []
    for name, way in ways.items():
        try:
            timer(way)
        except Exception as error:
            failed.append((name, error))
        else:
            working[name] = way
    if not working:
        raise failed[0][1]
    for name, cause in failed:
        others = ", ".join(working)
        warnings.warn(f"{name!r} fails and is left out, {others} remain: {type(cause).__name__}: {cause}", stacklevel=3)
    return working


def why_fixed() -> str | None:
    """Why no measured choice may be used, new or old, or None if one may."""
    if torch.are_deterministic_algorithms_enabled():
        return "not measured: torch.use_deterministic_algorithms is on, and what is fastest differs between runs"
    if torch.backends.cudnn.deterministic:
        return "not measured: torch.backends.cudnn.deterministic is on, and what is fastest differs between runs"
    return None


def why_not_measured() -> str | None:
    """Why nothing may be measured now, or None if it may."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "not measured: a CUDA graph is being captured; run the step once before capturing it"
    return why_fixed()


def _gpu_ms(device: torch.device, way: Way) -> float:
    """Time on the GPU alone: it is kept busy while the host gets its launches ready, and its cache is overwritten.

    If it was idle before the host was ready, it is timed once more and kept busy for longer.
    """
    flushes = FLUSHES
    with torch.cuda.device(device):
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _flush(device, flushes)
            begin.record()
            way()
            waited = begin.query()
            end.record()
            end.synchronize()
            if not waited or flushes >= MOST_FLUSHES:
                ms: float = begin.elapsed_time(end)
                return ms
            flushes *= 2


def _flush(device: torch.device, times: int) -> None:
    """Overwrite the cache: with memory that a way can have afterwards, and with less of it where there is less."""
    for part in (1, 2, 4, 8, 16):
        try:
            scratch = torch.empty(FLUSHED_BYTES // part, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            continue
        for _ in range(times * part):
            scratch.zero_()
        return


def _cpu_ms(way: Way) -> float:
    begin = time.perf_counter()
    way()
    return 1e3 * (time.perf_counter() - begin)
