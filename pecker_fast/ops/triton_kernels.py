"""The Triton kernels, loaded on first use: importing this file imports no triton."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether triton runs its kernels in Python, on tensors of any device: slow, for tests. Read as triton reads it."""
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
"""Device types whose tensors the kernels take."""
MIN_CAPABILITY = (8, 0)
"""Oldest GPUs that the kernels are compiled for: Ampere."""


def load(stem: str) -> ModuleType:
    """The kernels of one op, ``pecker_fast.kernels.<stem>``.

    Raises:
        ImportError: triton is missing or broken; the original error is the cause.
    """
    return importlib.import_module(f"pecker_fast.kernels.{stem}")


@functools.cache
def why_not() -> str | None:
    """Why the kernels cannot run here and what to do about it, or None if they can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not load: {error}. pip install triton, in the version that your torch names"
    if INTERPRETED or not torch.cuda.is_available():
        return None
    return too_old(torch.cuda.get_device_capability())


def too_old(capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run our kernels, or None if it can."""
    if capability >= MIN_CAPABILITY:
        return None
    have, need = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
    return f"this GPU has compute capability {have}, the kernels need {need} (Ampere) or newer"
