"""The native module `pecker_fast._C`, loaded on first use: importing this file is free and cannot fail."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

_REMEDY = (
    "pecker_fast's native module is not available: {cause}. Reinstall pecker_fast where there is a C++ "
    "compiler (g++ or clang++) and PECKER_FAST_NATIVE is not 0; in a checkout, run `pip install -e .` again. "
    "Without it the reference and Triton backends remain."
)
_NO_CUDA = (
    "pecker_fast's native module was built without CUDA. Reinstall pecker_fast with nvcc on PATH or in "
    "CUDA_HOME/bin; PECKER_FAST_CUDA=1 makes its absence an error."
)


def load() -> ModuleType:
    """Returns `pecker_fast._C`.

    Raises:
        ImportError: It was not built or does not load; the original error is the cause.
    """
    found = _find()
    if isinstance(found, ImportError):
        raise ImportError(_REMEDY.format(cause=found)) from found
    return found


def available() -> bool:
    """Whether `load()` succeeds."""
    return why_not() is None


def why_not() -> str | None:
    """Why `load()` would raise and what to do about it, or None if it succeeds."""
    found = _find()
    return _REMEDY.format(cause=found) if isinstance(found, ImportError) else None


def why_not_cuda() -> str | None:
    """Why the native module has no CUDA kernels and what to do about it, or None if it has them."""
    found = _find()
    if isinstance(found, ImportError) or found.build_info()["cuda"]:
        return why_not()
    return _NO_CUDA


@functools.cache
def _find() -> ModuleType | ImportError:
    try:
        return importlib.import_module("pecker_fast._C")
    except ImportError as error:
        return error
