"""Weights of the Inception network from a local file, checked name by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pecker_fast.checkpoint import StrPath, read_safetensors
from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_dtypes, unwrapped
from pecker_fast.models.inception import InceptionV3
from pecker_fast.torch_file import read_torch, weights_of

_COUNTER = "num_batches_tracked"
"""Of batch norm: of no use in eval mode, and missing from old files."""


def load_inception(path: StrPath) -> InceptionV3:
    """Read the network of FID from a local file; nothing is downloaded.

    Args:
        path: ``.safetensors``, or a ``.pth`` / ``.pt`` state dict such as ``pt_inception-2015-12-05-6726825d.pth`` of
            pytorch-fid (torch-fidelity has the same file), read by `pecker_fast.torch_file.read_torch`.

    Returns:
        The network in float32, eval mode, without gradients, on the CPU.

    Raises:
        FileFormatError: The file is missing, damaged or foreign, or weights are missing, unexpected, misshapen, or not
            finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(
            f"{path}: no such file; expected the weights of the FID Inception network (pt_inception-2015-12-05)"
        )
    stored = path.suffix == ".safetensors"
    found = unwrapped(str(path), read_safetensors(path)[0]) if stored else _state_dict(path)
    with torch.device("meta"):  # weights that do not fit are refused before anything is allocated
        network = InceptionV3()
    expected = _without_counters(network.state_dict())
    weights = _without_counters(found)
    _check(path, expected, weights)
    state = {name: _copy(tensor) for name, tensor in weights.items()}
    counters = {name: torch.tensor(0, device="cpu") for name in network.state_dict() if name.endswith(_COUNTER)}
    network.load_state_dict(state | counters, assign=True)
    network.weights = _digest(state)
    return network.eval().requires_grad_(False)


def _state_dict(path: Path) -> dict[str, Tensor]:
    return weights_of(str(path), read_torch(path, legacy=True))  # the published file may be older than torch 1.6


def _copy(tensor: Tensor) -> Tensor:
    """Not a window into the file."""
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _without_counters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not str(name).endswith(_COUNTER)}


def _check(path: Path, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    check_dtypes(str(path), {name: tensor.dtype for name, tensor in weights.items()})
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys(), key=str)
    if missing or unexpected:
        raise FileFormatError(
            f"{path}: not the FID Inception network: {len(missing)} weights missing (first: {missing[:1]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:1]})"
        )
    for name, tensor in weights.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or not tensor.is_floating_point():
            raise FileFormatError(
                f"{path}: {name}: expected floating-point {tuple(wanted.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}; torchvision's Inception has 1000 outputs and does not fit"
            )
        if not bool(tensor.isfinite().all()):
            raise FileFormatError(f"{path}: {name} holds NaN or infinite values; the file is damaged")


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()
