"""The exact k-th largest value over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.layout import in_memory_order


def select_threshold(tensors: Sequence[Tensor], k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Threshold that leaves exactly ``k`` of all values of ``tensors``.

    In plain torch: ``threshold = torch.cat([t.flatten() for t in tensors]).sort(descending=True).values[k - 1]``.
    The k largest are all values above it and the first ``ties`` of those equal to it, by tensor, then by index.
    NaN counts as -inf, so it is kept last; -0.0 counts as 0.0.

    The "cpu" backend counts digits of integer keys instead of sorting: exact, two passes over float32 (four over
    float64), no copy of tensors that are dense in memory, the same for any number of threads.

    Args:
        tensors: Tensors of any shapes and strides, one dtype (float32 or float64) and one device.
        k: How many to keep, 1 to the number of values in all.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``threshold``: 0-d, of the tensors' dtype, never NaN or -0.0. ``ties``: 0-d int64, at least 1.

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
    threshold, ties = torch.ops.pecker_fast.select_threshold([t.detach() for t in tensors], k, backend)
    return threshold, ties


def select_threshold_reference(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of ``select_threshold``: one concatenated copy and a quickselect."""
    values = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    values = torch.where(values.isnan(), -torch.inf, values)
    threshold = values.kthvalue(values.numel() - k + 1).values + 0.0  # -0.0 becomes 0.0
    return threshold, k - (values > threshold).sum()


def _cpu(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    values = [in_memory_order(tensor) for tensor in tensors]
    threshold, ties = native.load().select_threshold_cpu(
        addresses=[value.data_ptr() for value in values],
        numels=[value.numel() for value in values],
        is_double=values[0].dtype == torch.float64,
        k=k,
        threads=torch.get_num_threads(),
    )
    return torch.tensor(threshold, dtype=values[0].dtype), torch.tensor(ties)


_OP = Op(
    "select_threshold",
    {
        "reference": Backend(select_threshold_reference),
        "cpu": Backend(_cpu, devices=("cpu",), why_not=native.why_not),
    },
    prefer={"cpu": ("cpu",)},
)

library.define("select_threshold(Tensor[] tensors, SymInt k, str? backend) -> (Tensor, Tensor)")


@torch.library.impl(library, "select_threshold", "CompositeExplicitAutograd")
def _run(tensors: Sequence[Tensor], k: int, backend: str | None) -> tuple[Tensor, Tensor]:
    threshold, ties = _OP.run(_OP.choose(tensors[0].device, backend), tensors, k)
    return threshold, ties


@torch.library.register_fake("pecker_fast::select_threshold")
def _fake(tensors: Sequence[Tensor], k: int, backend: str | None) -> tuple[Tensor, Tensor]:
    return tensors[0].new_empty(()), tensors[0].new_empty((), dtype=torch.int64)
