"""Tensors as flat stretches of memory, which is what the native kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions (also channels-last)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return tensor.numel() == 0
            expected *= size
    return True


def is_channels_last(tensor: Tensor) -> bool:
    """Whether images, or a weight, lie in memory with the channels last, and not in C order as well."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def in_memory_order(tensor: Tensor) -> Tensor:
    """All values as one dimension, in the order of memory; a copy in C order if there are gaps or repeats."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.contiguous().view(-1)


def like_layout(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` with its elements in memory where the dense ``other`` of the same shape has them; maybe a copy."""
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    same = all(ours == theirs for size, ours, theirs in strides if size != 1)
    return tensor if same else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def native_arrays(values: Sequence[Tensor]) -> dict[str, Any]:
    """What the native module takes for many arrays of float32 or float64, each dense in memory."""
    return {
        "addresses": [value.data_ptr() for value in values],
        "numels": [value.numel() for value in values],
        "is_double": values[0].dtype == torch.float64,
    }


def check_arrays(op: str, tensors: Sequence[Tensor], k: int) -> None:
    """Refuse tensors that are not all float32 or all float64 on one device, and a ``k`` that is not among them.

    Raises:
        ValueError: One of these, in the name of ``op``.
    """
    if not tensors:
        raise ValueError(f"{op}: expected at least one tensor, got none")
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: expected float32 or float64 tensors, got {dtype}")
    for i, tensor in enumerate(tensors):
        if tensor.dtype != dtype or tensor.device != device:
            got = f"tensor {i} as {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{op}: expected all tensors as {dtype} on {device}, got {got}")
    total = sum(tensor.numel() for tensor in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"{op}: k must be 1 to {total} (the number of values), got {k}")
