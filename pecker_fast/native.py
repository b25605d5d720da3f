"""The native module `pecker_fast._C`, loaded on first use: importing this file is free and cannot fail."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
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
_TOO_OLD = (
    "this GPU has compute capability {have}, and pecker_fast's native module was compiled for {need}. Reinstall "
    "pecker_fast with CUDAARCHS set to this GPU's; older ones than 8.0 (Ampere) are not tested."
)

_DOES_NOT_RUN = (
    "pecker_fast's native CUDA kernels do not run here: {cause}. Update this GPU's driver, or reinstall pecker_fast "
    "with an nvcc that is no newer than the driver; until then Triton's kernels or the reference are used."
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


@functools.cache
def why_not_cuda() -> str | None:
    """Why the native CUDA kernels cannot run here and what to do about it, or None if they can where a GPU is."""
    found = _find()
    if isinstance(found, ImportError):
        return why_not()
    info = found.build_info()
    if not info["cuda"]:
        return _NO_CUDA
    import torch  # here: this file is imported by those who only ask what was built

    if not torch.cuda.is_available():
        return None
    if reason := too_old(torch.cuda.get_device_capability(), info["cuda_architectures"]):
        return reason
    cause = found.cuda_probe()
    return None if cause is None else _DOES_NOT_RUN.format(cause=cause)


def too_old(capability: tuple[int, int], architectures: str) -> str | None:
    """Why a GPU of this compute capability cannot run what was compiled for ``architectures``, or None if it can.

    Args:
        capability: (major, minor).
        architectures: As CMake names them: "80 90", "90a-real", ... Newer GPUs run what was compiled for older ones.
    """
    compiled = [int(number) for number in re.findall(r"\d+", architectures)]
    if not compiled or 10 * capability[0] + capability[1] >= min(compiled):
        return None
    return _TOO_OLD.format(have=".".join(map(str, capability)), need=architectures)


@functools.cache
def _find() -> ModuleType | ImportError:
    try:
        found = importlib.import_module("pecker_fast._C")
    except ImportError as error:
        return error
    own, file = Path(__file__).resolve().parent, Path(str(found.__file__)).resolve()
    if file.parent != own:  # an editable installation offers its own to every checkout
        return ImportError(f"{file} belongs to another pecker_fast than {own}")
    return found
