"""What torch's allocator really gave out on a CPU: a GPU's counts by itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, _ExperimentalConfig

T = TypeVar("T")


def allocated(work: Callable[[], T]) -> tuple[int, int, T]:
    """Bytes at their height while ``work()`` runs, bytes that are left of it, and what it returns.

    From the profiler's own memory events, above what was there before: ``torch.profiler`` without its tables, which
    would take longer than the work.
    """
    gc.collect()
    config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    torch.autograd._prepare_profiler(config, {ProfilerActivity.CPU})
    torch.autograd._enable_profiler(config, {ProfilerActivity.CPU})
    try:
        result = work()
    finally:
        events = [event for event in torch.autograd._disable_profiler().events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now, result
