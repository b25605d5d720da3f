"""Tensors as flat stretches of memory, which is what the native CPU kernels take."""

from __future__ import annotations

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


def in_memory_order(tensor: Tensor) -> Tensor:
    """All values as one dimension, in the order of memory; a copy in C order if there are gaps or repeats."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.contiguous().view(-1)


def like_layout(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` with its elements in memory where the dense ``other`` of the same shape has them; maybe a copy."""
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    same = all(ours == theirs for size, ours, theirs in strides if size != 1)
    return tensor if same else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)
