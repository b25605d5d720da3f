"""Safetensors with one header for the same content, whoever writes them: names in order, tensor after tensor.

The library's own writer lists the strings of a header in the order of a hash table, which differs from run to run, and
wants all tensors in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_ALIGNMENT = 8


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any layout and device, one at a time: largest elements first, then by name.

    Args:
        file: Where to.
        tensors: Name -> tensor; those that share memory are written once each.
        metadata: Strings of the header.

    Raises:
        OSError: It cannot be written.
        ValueError: A tensor has no values of its own, or is of a dtype that the format does not have.
    """
    # In this order every tensor begins at a multiple of its elements' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(bytes_of(tensor).data)


def bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The values of a tensor, (bytes,), row by row: a window into its memory where that is laid out so."""
    values: npt.NDArray[np.uint8] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return values


def _dtype(name: str, tensor: Tensor) -> str:
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{name}: expected a dense tensor with values, got {tensor.layout} on {tensor.device}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: {tensor.dtype} has no place in a safetensors file; convert it first")
    return _DTYPES[tensor.dtype]
