"""Running saliency from gradients: signed sum (SalUn), magnitude or square, per weight or per block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.blocks import BlockGrid
from pecker_fast.ops import triton_kernels
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.layout import is_dense, like_layout
from pecker_fast.scatter import DTYPE_CODES

Accumulate: TypeAlias = Literal["signed_sum", "abs", "square"]


def accumulate_saliency_(
    total: Tensor,
    grad: Tensor,
    accumulate: Accumulate = "signed_sum",
    *,
    grid: BlockGrid | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add one gradient to a running saliency, in place.

    In plain torch: ``total += f(grad)`` with f(g) = g, ``|g|`` or ``g**2``; with ``grid`` its sum over each block.
    The signed sum is SalUn's: its magnitude is taken once, at the end (Fan et al. 2024, arXiv 2310.12508).

    Per weight the "cpu" and "triton" backends have the reference's bits. Blocks are summed in an order that depends on
    the layout of ``grad`` alone, by "cpu" in float64 and by "triton" in ``total``'s dtype: every run gives the same
    bits, whatever the number of threads.

    Args:
        total: Running sums, float32 or float64: of ``grad``'s shape, or (num_blocks,) with ``grid``. Changed.
        grad: Gradient of one weight, any float dtype.
        accumulate: "signed_sum", "abs" or "square".
        grid: Blocks to sum over; None keeps one saliency per weight.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``total``.

    Raises:
        ValueError: Unknown ``accumulate``, shapes or devices that do not fit, a ``total`` narrower than float32, or a
            ``grad`` that is not of a float dtype.
    """
    if accumulate not in get_args(Accumulate):
        raise ValueError(
            f"accumulate_saliency_: accumulate must be one of {', '.join(get_args(Accumulate))}, got {accumulate!r}"
        )
    expected = grad.shape if grid is None else (grid.num_blocks,)
    if tuple(total.shape) != tuple(expected) or (grid is not None and tuple(grad.shape) != grid.shape):
        raise ValueError(
            f"accumulate_saliency_: expected total of shape {tuple(expected)} for grad of shape {tuple(grad.shape)}"
            f"{'' if grid is None else f' cut as {grid.shape}'}, got {tuple(total.shape)}"
        )
    if total.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"accumulate_saliency_: total must be float32 or float64, got {total.dtype}")
    if not grad.is_floating_point() or grad.device != total.device:
        raise ValueError(
            f"accumulate_saliency_: expected grad of a float dtype on {total.device}, got {grad.dtype} on {grad.device}"
        )
    view, block = (None, None) if grid is None else (grid.view, grid.block)
    torch.ops.pecker_fast.accumulate_saliency_(total.detach(), grad.detach(), accumulate, view, block, backend)
    return total


def accumulate_saliency_reference_(
    total: Tensor, grad: Tensor, accumulate: str, view: list[int] | None, block: list[int] | None
) -> None:
    """Plain-torch twin of ``accumulate_saliency_``."""
    grad = grad.to(total.dtype)
    if accumulate == "abs":
        grad = grad.abs()
    elif accumulate == "square":
        grad = grad.square()
    if view is not None and block is not None:
        out, in_, taps = view
        grad = BlockGrid(tuple(grad.shape), (out, in_, taps), (block[0], block[1])).block_sums(grad)
    total.add_(grad)


_PerWeight: TypeAlias = Callable[[Tensor, Tensor, int], None]
_PerBlock: TypeAlias = Callable[[Tensor, Tensor, int, list[int], list[int]], None]


def _kernels(per_weight: _PerWeight, per_block: _PerBlock) -> Callable[..., None]:
    """A backend from kernels that take tensors as they lie in memory.

    Args:
        per_weight: (total, grad, kind), both dense, with their elements in the same places.
        per_block: (total, grad, kind, memory, block) with a dense ``grad`` that lies as ``memory`` says: [out, repeat,
            in, unit], as in csrc/accumulate_saliency.h.
    """

    def run(total: Tensor, grad: Tensor, accumulate: str, view: list[int] | None, block: list[int] | None) -> None:
        if not is_dense(total):
            dense = total.clone(memory_format=torch.contiguous_format)
            run(dense, grad, accumulate, view, block)
            total.copy_(dense)
            return
        kind = get_args(Accumulate).index(accumulate)
        grad = grad if grad.dtype in DTYPE_CODES else grad.to(total.dtype)
        if view is None or block is None:
            per_weight(total, like_layout(grad, total), kind)
        elif block == [1, 1] and view[1:] == [1, 1]:
            per_weight(total, grad.contiguous().view(-1), kind)
        else:
            memory, grad = _in_memory(grad, view)
            per_block(total, grad, kind, memory, block)

    return run


def _in_memory(grad: Tensor, view: list[int]) -> tuple[list[int], Tensor]:
    """How ``grad`` lies in memory, and ``grad`` itself or a copy that lies so."""
    out, in_, taps = view
    if grad.is_contiguous(memory_format=torch.channels_last) and view == [*grad.shape[:2], math.prod(grad.shape[2:])]:
        return [out, taps, in_, 1], grad
    return [out, 1, in_, taps], grad.contiguous()


def _cpu_per_weight(total: Tensor, grad: Tensor, kind: int) -> None:
    native.load().accumulate_saliency_cpu(**_native_arguments(total, grad, kind), numel=total.numel())


def _cpu_per_block(total: Tensor, grad: Tensor, kind: int, memory: list[int], block: list[int]) -> None:
    arguments = _native_arguments(total, grad, kind)
    native.load().accumulate_block_saliency_cpu(**arguments, view=memory, block=block)


def _native_arguments(total: Tensor, grad: Tensor, kind: int) -> dict[str, object]:
    return {
        "total": total.data_ptr(),
        "total_is_double": total.dtype == torch.float64,
        "grad": grad.data_ptr(),
        "grad_dtype": DTYPE_CODES[grad.dtype],
        "kind": kind,
        "threads": torch.get_num_threads(),
    }


def _triton_per_weight(total: Tensor, grad: Tensor, kind: int) -> None:
    triton_kernels.load("accumulate_saliency").accumulate_(total, grad, kind)


def _triton_per_block(total: Tensor, grad: Tensor, kind: int, memory: list[int], block: list[int]) -> None:
    triton_kernels.load("accumulate_saliency").accumulate_blocks_(total, grad, kind, memory, block)


_OP = Op(
    "accumulate_saliency_",
    {
        "reference": Backend(accumulate_saliency_reference_),
        "cpu": Backend(_kernels(_cpu_per_weight, _cpu_per_block), devices=("cpu",), why_not=native.why_not),
        "triton": Backend(
            _kernels(_triton_per_weight, _triton_per_block),
            devices=triton_kernels.DEVICES,
            why_not=triton_kernels.why_not,
        ),
    },
    prefer={"cpu": ("cpu",), "cuda": ("triton",)},
)

library.define(
    "accumulate_saliency_(Tensor(a!) total, Tensor grad, str accumulate, int[]? view, int[]? block, str? backend) -> ()"
)


@torch.library.impl(library, "accumulate_saliency_", "CompositeExplicitAutograd")
def _run(
    total: Tensor, grad: Tensor, accumulate: str, view: list[int] | None, block: list[int] | None, backend: str | None
) -> None:
    name = _OP.choose(total.device, backend)
    asked = backend or _OP.requested()
    if asked is None and view is None and accumulate == "signed_sum":
        name = "reference"  # one addition, which torch does as well as anybody
    _OP.run(name, total, grad, accumulate, view, block)


@torch.library.register_fake("pecker_fast::accumulate_saliency_")
def _fake(
    total: Tensor, grad: Tensor, accumulate: str, view: list[int] | None, block: list[int] | None, backend: str | None
) -> None:
    return None
