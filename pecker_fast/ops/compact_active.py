"""From a threshold to the sorted positions of the active values, over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.layout import check_arrays, native_arrays


def compact_active(
    tensors: Sequence[Tensor], threshold: Tensor, ties: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Positions of the ``k`` largest values, in order, from what ``select_threshold(tensors, k)`` returned.

    In plain torch, ``torch.cat([((t > threshold) | first_ties_of(t == threshold)).flatten().nonzero() for t in
    tensors])``: active are the values above the threshold and the first ``ties`` of those equal to it, by tensor, then
    by position. NaN counts as -inf. Also for block scores: position i is then block i.

    The "cuda" backend reads every value once and never waits for the device; a CUDA graph can hold it.

    Args:
        tensors: As for ``select_threshold``. Positions are those of the flattened tensor (C order), so that "cuda"
            copies tensors that are not contiguous.
        threshold: The k-th largest value: 0-d, of the tensors' dtype and device.
        ties: How many of the values equal to it are active: 0-d int64, on the same device.
        k: How many are active in all.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``index``: int64 (k,), the positions of tensor after tensor. ``offsets``: int64 (len(tensors) + 1,), of which
        ``index[offsets[i] : offsets[i + 1]]`` are those in tensor i. With a threshold that does not belong to ``k``,
        ``offsets`` still counts all active values; ``index`` has the first k, and -1 where there are fewer.

    Raises:
        ValueError: No tensors, mixed dtypes or devices, or ``k`` out of range.
    """
    check_arrays("compact_active", tensors, k)
    dtype, device = tensors[0].dtype, tensors[0].device
    for name, number, expected in (("threshold", threshold, dtype), ("ties", ties, torch.int64)):
        if number.dtype != expected or number.device != device or number.dim():
            raise ValueError(
                f"compact_active: {name}: expected 0-d {expected} on {device}, as select_threshold returns it, "
                f"got {tuple(number.shape)} {number.dtype} on {number.device}"
            )
    index, offsets = torch.ops.pecker_fast.compact_active([t.detach() for t in tensors], threshold, ties, k, backend)
    return index, offsets


def compact_active_reference(
    tensors: Sequence[Tensor], threshold: Tensor, ties: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of ``compact_active``."""
    left, offsets = int(ties), [0]
    index = ties.new_full((k,), -1)
    for tensor in tensors:
        # Flattened as booleans: values that lie channels-last are never copied.
        chosen = (tensor > threshold).reshape(-1)
        if left:
            equal = _equal(tensor, threshold).reshape(-1).nonzero().flatten()[:left]
            left -= len(equal)
            chosen[equal] = True
        positions = chosen.nonzero().flatten()
        free = index[offsets[-1] : offsets[-1] + len(positions)]
        free.copy_(positions[: len(free)])
        offsets.append(offsets[-1] + len(positions))
    return index, torch.tensor(offsets, device=index.device)


def _equal(values: Tensor, threshold: Tensor) -> Tensor:
    equal = values == threshold
    return equal.logical_or_(values.isnan()) if float(threshold) == -torch.inf else equal


def _cuda(tensors: Sequence[Tensor], threshold: Tensor, ties: Tensor, k: int) -> tuple[Tensor, Tensor]:
    module, values = native.load(), [tensor.contiguous() for tensor in tensors]
    arrays = native_arrays(values)
    index, offsets = ties.new_empty(k), ties.new_empty(len(values) + 1)
    workspace = index.new_empty(module.compact_workspace_bytes(**arrays), dtype=torch.uint8)
    with torch.cuda.device(index.device):
        module.compact_active_cuda(
            **arrays,
            threshold=threshold.data_ptr(),
            ties=ties.data_ptr(),
            index=index.data_ptr(),
            capacity=k,
            offsets=offsets.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=len(workspace),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return index, offsets


_OP = Op(
    "compact_active",
    {
        "reference": Backend(compact_active_reference),
        "cuda": Backend(_cuda, devices=("cuda",), why_not=native.why_not_cuda),
    },
    prefer={"cuda": ("cuda",)},
)

library.define(
    "compact_active(Tensor[] tensors, Tensor threshold, Tensor ties, SymInt k, str? backend) -> (Tensor, Tensor)"
)


@torch.library.impl(library, "compact_active", "CompositeExplicitAutograd")
def _run(
    tensors: Sequence[Tensor], threshold: Tensor, ties: Tensor, k: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    index, offsets = _OP.run(_OP.choose(tensors[0].device, backend), tensors, threshold, ties, k)
    return index, offsets


@torch.library.register_fake("pecker_fast::compact_active")
def _fake(
    tensors: Sequence[Tensor], threshold: Tensor, ties: Tensor, k: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    return ties.new_empty((k,)), ties.new_empty((len(tensors) + 1,))
