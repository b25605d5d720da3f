"""The exact k-th largest value over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pecker_fast.ops.dispatch import Backend, Op, library


def select_threshold(tensors: Sequence[Tensor], k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Threshold that leaves exactly ``k`` of all values of ``tensors``.

    In plain torch: ``threshold = torch.cat([t.flatten() for t in tensors]).sort(descending=True).values[k - 1]``.
    The k largest are all values above it and the first ``ties`` of those equal to it, by tensor, then by index.
    NaN counts as smaller than everything else.

    Args:
        tensors: Tensors of any shapes, one dtype (float32 or float64) and one device.
        k: How many to keep, 1 to the number of values in all.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``threshold``: 0-d, of the tensors' dtype. ``ties``: 0-d int64, at least 1.

    Raises:
        ValueError: No tensors, mixed dtypes or devices, or ``k`` out of range.
    """
    if not tensors:
        raise ValueError("select_threshold: expected at least one tensor, got none")
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"select_threshold: expected float32 or float64 tensors, got {dtype}")
    for i, tensor in enumerate(tensors):
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"select_threshold: expected all tensors as {dtype} on {device}, "
                f"got tensor {i} as {tensor.dtype} on {tensor.device}"
            )
    total = sum(tensor.numel() for tensor in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"select_threshold: k must be 1 to {total} (the number of values), got {k}")
    threshold, ties = torch.ops.pecker_fast.select_threshold(list(tensors), k, backend)
    return threshold, ties


def select_threshold_reference(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of ``select_threshold``: one concatenated copy and a quickselect."""
    values = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    values = torch.where(values.isnan(), -torch.inf, values)
    threshold = values.kthvalue(values.numel() - k + 1).values
    return threshold, k - (values > threshold).sum()


_OP = Op("select_threshold", {"reference": Backend(select_threshold_reference)})

library.define("select_threshold(Tensor[] tensors, SymInt k, str? backend) -> (Tensor, Tensor)")


@torch.library.impl(library, "select_threshold", "CompositeExplicitAutograd")
def _run(tensors: Sequence[Tensor], k: int, backend: str | None) -> tuple[Tensor, Tensor]:
    threshold, ties = _OP.run(_OP.choose(tensors[0].device, backend), tensors, k)
    return threshold, ties


@torch.library.register_fake("pecker_fast::select_threshold")
def _fake(tensors: Sequence[Tensor], k: int, backend: str | None) -> tuple[Tensor, Tensor]:
    return tensors[0].new_empty(()), tensors[0].new_empty((), dtype=torch.int64)
