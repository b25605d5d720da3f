"""Tensors as flat stretches of memory, which is what the native CPU kernels take."""

from __future__ import annotations

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
    tensor = tensor.detach().resolve_neg()
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.contiguous().view(-1)
