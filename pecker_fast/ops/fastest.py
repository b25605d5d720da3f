"""Which of several ways to compute the same is fastest on this machine: measured once, remembered, and told."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Way = Callable[[], object]

ROUNDS = 5
FLUSHED_BYTES = 256 << 20
"""More than any GPU's cache holds."""


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
    """The way with the lowest median time, each run in turn; every way is called ``1 + ROUNDS`` times."""
    timer = _cpu_ms
    if device.type == "cuda":
        timer = functools.partial(_gpu_ms, torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device))
    for way in ways.values():
        timer(way)  # compiles, and fills caches of algorithms
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(timer(way))
    ms = {name: statistics.median(values) for name, values in times.items()}
    return Choice(min(ms, key=lambda name: ms[name]), ms=ms)


def why_not_measured() -> str | None:
    """Why nothing may be measured now, or None if it may."""
    if torch.are_deterministic_algorithms_enabled():
        return "not measured: torch.use_deterministic_algorithms is on, and what is fastest differs between runs"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "not measured: a CUDA graph is being captured; run the step once before capturing it"
    return None


def _gpu_ms(scratch: torch.Tensor, way: Way) -> float:
    """Time on the GPU alone: it is kept busy while the host gets its launches ready, and its cache is overwritten."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):
        scratch.zero_()
    begin.record()
    way()
    end.record()
    end.synchronize()
    ms: float = begin.elapsed_time(end)
    return ms


def _cpu_ms(way: Way) -> float:
    begin = time.perf_counter()
    way()
    return 1e3 * (time.perf_counter() - begin)
