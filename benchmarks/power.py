"""Energy of a GPU's work, from the power that it says it draws."""

from __future__ import annotations

import math
import statistics
import subprocess
import threading
from collections.abc import Callable

import torch

SECONDS, PAUSE = 5.0, 0.05
"""For how long steps are repeated, and how often the power is read."""


def joules(run: Callable[[int], float], seconds: float) -> float | str:
    """Energy of one step, or why it is not known.

    Args:
        run: Runs so many steps, and returns the seconds that they took.
        seconds: About what one takes.
    """
    watts = reader()
    if isinstance(watts, str):
        return watts
    steps, done, samples = max(math.ceil(SECONDS / seconds), 1), threading.Event(), []

    def sample() -> None:
        while not done.wait(PAUSE):
            samples.append(watts())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        taken = run(steps)
    finally:
        done.set()
        thread.join()
    return statistics.fmean(samples) * taken / steps if samples else "not measured: no sample of the power"


def reader() -> Callable[[], float] | str:
    """Reads the watts that the GPU draws, by NVML or nvidia-smi; or why there is nothing to read."""
    try:
        import pynvml
    except ImportError:
        return _smi_reader()
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        pynvml.nvmlDeviceGetPowerUsage(handle)
    except pynvml.NVMLError as error:
        return f"not measured: NVML says {error}"
    return lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000


def _smi_reader() -> Callable[[], float] | str:
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-i", "0"]

    def read() -> float:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)

    try:
        read()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        return f"not measured: no NVML, and nvidia-smi says {error}"
    return read
