"""The exact k-th largest value over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.layout import check_arrays, in_memory_order, native_arrays


def select_threshold(tensors: Sequence[Tensor], k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Threshold that leaves exactly ``k`` of all values of ``tensors``.

    In plain torch: ``threshold = torch.cat([t.flatten() for t in tensors]).sort(descending=True).values[k - 1]``.
    The k largest are all values above it and the first ``ties`` of those equal to it, by tensor, then by index.
    NaN counts as -inf, so it is kept last; -0.0 counts as 0.0.

    The "cpu" backend counts digits of integer keys instead of sorting: exact, two passes over float32 (four over
    float64), no copy of tensors that are dense in memory, the same for any number of threads. "cuda" does so in three
    passes (six), never waits for the device, and leaves both results there; a CUDA graph can hold it.

    Args:
        tensors: Tensors of any shapes and strides, one dtype (float32 or float64) and one device.
        k: How many to keep, 1 to the number of values in all.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``threshold``: 0-d, of the tensors' dtype, never NaN or -0.0. ``ties``: 0-d int64, at least 1.

    Raises:
        ValueError: No tensors, mixed dtypes or devices, or ``k`` out of range.
    """
    check_arrays("select_threshold", tensors, k)
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
    threshold, ties = native.load().select_threshold_cpu(**native_arrays(values), k=k, threads=torch.get_num_threads())
    return torch.tensor(threshold, dtype=values[0].dtype, device="cpu"), torch.tensor(ties, device="cpu")


def _cuda(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    module, values = native.load(), [in_memory_order(tensor) for tensor in tensors]
    threshold, ties = values[0].new_empty(()), values[0].new_empty((), dtype=torch.int64)
    workspace = values[0].new_empty(module.select_workspace_bytes(len(values)), dtype=torch.uint8)
    with torch.cuda.device(threshold.device):
        module.select_threshold_cuda(
            **native_arrays(values),
            k=k,
            threshold=threshold.data_ptr(),
            ties=ties.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=len(workspace),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return threshold, ties


_OP = Op(
    "select_threshold",
    {
        "reference": Backend(select_threshold_reference),
        "cpu": Backend(_cpu, devices=("cpu",), why_not=native.why_not),
        "cuda": Backend(_cuda, devices=("cuda",), why_not=native.why_not_cuda),
    },
    prefer={"cpu": ("cpu",), "cuda": ("cuda",)},
)

library.define("select_threshold(Tensor[] tensors, SymInt k, str? backend) -> (Tensor, Tensor)")


@torch.library.impl(library, "select_threshold", "CompositeExplicitAutograd")
def _run(tensors: Sequence[Tensor], k: int, backend: str | None) -> tuple[Tensor, Tensor]:
    threshold, ties = _OP.run(_OP.choose(tensors[0].device, backend), tensors, k)
    return threshold, ties


@torch.library.register_fake("pecker_fast::select_threshold")
def _fake(tensors: Sequence[Tensor], k: int, backend: str | None) -> tuple[Tensor, Tensor]:
    return tensors[0].new_empty(()), tensors[0].new_empty((), dtype=torch.int64)
